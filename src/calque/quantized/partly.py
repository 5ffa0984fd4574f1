"""A network of which parts are quantized and the rest runs as it is."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from calque.errors import SpecError
from calque.grid.bits import Plan
from calque.network import Signature
from calque.quantized.integer import IntegerModel
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.report import Report


class PartlyQuantized(QuantizedModel):
    """A network with quantized parts in place of the sub-modules that could be captured; the rest of it runs as it is.

    Attributes:
        model: a copy of the network with its parts replaced.
        parts: by the path of the sub-module; each can be saved, exported and verified by itself.
        plan, report, layers, quantizers: of all parts, names behind the part's path.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, QuantizedModel], report: Report):
        nn.Module.__init__(self)
        self.model = model
        self.parts = dict(parts)
        self.signature = Signature.of(model)
        self.plan = Plan({f"{path}.{name}": bits for path, part in parts.items() for name, bits in part.plan.items()})
        self.report = report
        self.prices = None
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.model(*args, **kwargs)

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name, part by part."""
        return {f"{path}.{name}": layer for path, part in self.parts.items() for name, layer in part.layers.items()}

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by the name of their edge, part by part."""
        return {f"{path}.{name}": grid for path, part in self.parts.items() for name, grid in part.quantizers.items()}

    def integer(self) -> IntegerModel:
        """Raises SpecError: each part has its own exact evaluation."""
        raise whole_only(self, "q.integer()", "q.parts[path].integer()")


def whole_only(q: PartlyQuantized, what: str, instead: str) -> SpecError:
    """The error of what needs a network that was captured whole."""
    return SpecError(
        f"{what} needs a network that was captured whole; this one was quantized in parts ({', '.join(q.parts)}). Use {instead}."
    )
