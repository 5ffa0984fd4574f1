"""What the fits of a network's layers leave behind."""

from dataclasses import dataclass, field

from calque.calibration.channel_statistics import ChannelStatistics
from calque.fitting.problem import Fit
from calque.grid.bits import Bits
from calque.network import WeightedLayer
from calque.quantized.modules import QuantizedLayer, Quantizer


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """One layer, done.

    Attributes:
        name, bits: which layer, at which bits.
        layer: with codes; the float layer where it stays float.
        fit: None where it stays float.
        grid: of its input; None where that is float.
        values: that it returns for one input.
        tied: whether an earlier layer stores its weights.
        seconds: spent on it.
    """

    name: str
    bits: Bits
    layer: QuantizedLayer | WeightedLayer
    fit: Fit | None
    grid: Quantizer | None
    values: int
    tied: bool
    seconds: float


@dataclass
class Fitted:
    """All layers and grids of a network, as they are made.

    Attributes:
        layers: by layer name.
        quantizers: by the name of their edge.
        statistics: the float network's, by layer name.
        weak: layers with fewer equations than unknowns, with both numbers.
        unmoved: layers whose fit gained nothing.
        notes: what the report says.
    """

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    weak: dict[str, tuple[int, int]] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
