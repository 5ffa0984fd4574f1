"""What each stage of a run gained, and what the outputs lost, as data."""

from dataclasses import dataclass
from typing import Any

CERTAIN = 0.99  # resnet20 gives its training images 0.995, and new ones, whose KL is eight times as large, 0.971
LIMIT_DB = 200.0  # of equal outputs; float32 itself ends near 150


@dataclass(frozen=True, slots=True)
class Tuned:
    """The loss on held-out inputs at the start and of what was kept, and the steps that led there (0: the start)."""

    before: float
    after: float
    steps: int


@dataclass(frozen=True, slots=True)
class Distilled:
    """What a distillation gained.

    Attributes:
        before, after: its loss on held-out inputs and mixtures of them, the start's and of what was kept.
        steps: that were taken; as `steps` of the recipe they reproduce the run.
        kept: the steps that led to what was kept; 0 is the start.
        seconds: in all.
    """

    before: float
    after: float
    steps: int
    kept: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"distillation: loss {self.before:.4g} -> {self.after:.4g} on held-out inputs and their mixtures, "
            f"{self.steps} steps in {self.seconds:.1f} s, step {self.kept} kept"
        )


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """One output of the quantized network beside the float network's.

    Attributes:
        name: its key or field in what forward returns; "output" where that is one tensor.
        decibels: variance of the float output over the mean square of the error, from -LIMIT_DB to LIMIT_DB.
        kl: of scores of classes (N, C), KL(float || quantized) in nats, mean over inputs; else None.
        same_class: of scores of classes, the share of inputs with the same highest score; else None.
        certainty: of scores of classes, the mean probability that the float network gives its own class; else None. Where it is
            near 1, as on images that the network was trained on, KL and classes of new inputs will be worse than these.
    """

    name: str
    decibels: float
    kl: float | None = None
    same_class: float | None = None
    certainty: float | None = None

    def __str__(self) -> str:
        decibels = "equal" if self.decibels >= LIMIT_DB else f"{self.decibels:.1f} dB"
        if self.kl is None or self.certainty is None:
            return decibels
        sure = " (the float network is sure of these: expect more KL on others)" if self.certainty > CERTAIN else ""
        return f"{decibels}, KL {self.kl:.3g} nats, same class {self.same_class:.1%}{sure}"


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What quantization cost the whole network, by its outputs.

    Attributes:
        inputs: the calibration inputs compared, the last ones.
        held_out: whether no fit saw them. They chose between fits, ranges cover them, and statistics count them in.
        outputs: every output of real numbers, in the order in which forward returns them.
    """

    inputs: int
    held_out: bool
    outputs: tuple[OutputFidelity, ...]

    @property
    def worst(self) -> OutputFidelity:
        """The output with the fewest decibels."""
        return min(self.outputs, key=lambda output: output.decibels)

    def __str__(self) -> str:
        where = "held-out calibration inputs" if self.held_out else "calibration inputs that the fits used as well"
        line = f"outputs on {self.inputs} {where}: "
        if len(self.outputs) == 1:
            return f"{line}{self.worst}"
        scores = [output for output in self.outputs if output.kl is not None and output is not self.worst]
        more = "".join(f"; {output.name}: {output}" for output in scores)
        return f"{line}worst of {len(self.outputs)} is {self.worst.name}: {self.worst}{more}"

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "Fidelity":
        """What `dataclasses.asdict` took apart."""
        outputs = tuple(OutputFidelity(**output) for output in table["outputs"])
        return cls(table["inputs"], table["held_out"], outputs)
