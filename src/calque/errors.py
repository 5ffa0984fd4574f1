"""What can go wrong, by kind; every message says what, the rule, what was received and what to do."""

import sys
import warnings


class CalqueError(Exception):
    """Base of every error that calque raises on purpose."""


class SpecError(CalqueError, ValueError):
    """Bits, a plan, an override or an option that breaks a rule."""


class InfeasibleBudgetError(CalqueError, ValueError):
    """A budget that no allowed choice of bits keeps; the message names the smallest feasible one."""


class SurroundingsError(CalqueError, RuntimeError):
    """Something around the call that calque can neither leave nor compute under; the message names it."""


class CaptureError(CalqueError):
    """A network that `torch.export` cannot trace, or whose trace differs from the original."""


class CalibrationError(CalqueError, ValueError):
    """Calibration inputs that are empty, not finite, or of the wrong form."""


class LoadError(CalqueError, ValueError):
    """A file that is not calque's, is damaged, or does not fit the network it is loaded into."""


class ExportError(CalqueError):
    """A quantized network that the target format cannot carry; nothing is exported approximately."""


class VerificationError(CalqueError):
    """An exported file that does not compute what its quantized network computes.

    Attributes:
        verification: the `calque.Verification`, where the file ran and its agreement is below the bound; else None.
    """

    verification: object | None = None


class MissingExtraError(CalqueError, ImportError):
    """An optional package that is not installed, or cannot be imported; the message has the line that installs it."""


class CalibrationWarning(UserWarning):
    """Calibration data that is usable but weak; the message names the layer and the remedy."""


class CaptureWarning(UserWarning):
    """A network that could be captured, and so quantized, only in parts; the message names them and the reason."""


def warn(message: str, category: type[Warning] = CalibrationWarning) -> None:
    """Warns at the line that called calque, however deep in calque, or in torch below it, the reason was found."""
    frame, level = sys._getframe(1), 2  # 1 is this function
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("calque", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
