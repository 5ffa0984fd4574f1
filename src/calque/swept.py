"""What a sweep leaves of each layer, tensor and fit."""

from dataclasses import dataclass, field

from torch import Tensor

from calque.arithmetic import SMALLEST_SCALE
from calque.channel_statistics import ChannelStatistics
from calque.costs import FLOAT_BITS, layer_size
from calque.graph import WeightedLayer
from calque.quantizers import QuantizedLayer, Quantizer
from calque.report import LayerReport
from calque.solvers.problem import Fit
from calque.spec import Bits


@dataclass
class Swept:
    """What the sweep leaves: by layer name, by edge name, and the float network's statistics by layer name.

    `weak` names layers with fewer equations than unknowns, with both numbers; `unmoved` those whose fit gained nothing.
    """

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    weak: dict[str, tuple[int, int]] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note_range(self, what: str, low: Tensor, high: Tensor, bits: int) -> None:
        """Adds a note where the calibration inputs tell nothing of a tensor's range, or where it is too small for `bits`."""
        width = (high.clamp(min=0.0) - low.clamp(max=0.0)).item()
        if low == high:
            self.notes.append(f"{what} is the same value on all calibration inputs; its grid is a guess.")
        elif width < SMALLEST_SCALE * (2**bits - 1):
            self.notes.append(f"{what} spans {width:.1e} only: a finer scale would be no normal float32 number.")

    def report_float(self, name: str, layer: WeightedLayer, values: int, *, tied: bool, seconds: float) -> None:
        """Adds a layer that stays float.

        Args:
            values: that it returns for one input.  tied: whether an earlier layer stores the weights.
        """
        macs = layer.geometry.macs(values, layer.weight)
        size = 4 * ((0 if tied else layer.weight.numel()) + layer.bias.numel())
        operations = macs * FLOAT_BITS * FLOAT_BITS
        self.reports.append(LayerReport(name, "float", None, None, None, None, seconds, size, macs, operations))

    def report(
        self, name: str, bits: Bits, fit: Fit, values: int, *, tied: bool, grid: Quantizer | None, seconds: float
    ) -> None:
        """Adds a layer that was fitted, and is in `layers`.

        Args:
            values: that it returns for one input.  tied: whether an earlier layer stores the codes.  grid: of the input.
        """
        layer = self.layers[name]
        macs = layer.geometry.macs(values, layer.codes)
        codes = 0 if tied else layer.codes.numel()
        groups = layer.scale.numel() // len(layer.scale)
        low, high = grid.range if grid is not None else (None, None)
        self.reports.append(
            LayerReport(
                name, str(bits), low, high, fit.before, fit.after, seconds,
                layer_size(codes, layer.codes.shape[0], layer.bits, layer.geometry, groups), macs,
                macs * layer.bits * (bits.activation or FLOAT_BITS),
            )
        )  # fmt: skip
