"""torchao's PT2E, in its own environment, with a quantizer that puts grids where the others have theirs.

It calibrates ranges and rounds to nearest; it has no method for weights in PT2E. Activations: its histogram observer, whose
search of a range reckons with 256 levels whatever the bits, or plain extremes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from benchmarks.peers.adapter import COMMON, Method, Problem, Result, main
from benchmarks.peers.network import END_BITS, Bits, Marker, plan, prepare

WEIGHTED = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


class Clone(Marker):
    """A marker that survives the export."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Grids(Quantizer):  # type: ignore[misc] # its types are absent where this is checked
    """Puts layers, in their order, on the given bits and markers on 8."""

    def __init__(self, bits: list[Bits], observer: Any):
        super().__init__()
        self.bits, self.observer = bits, observer

    def annotate(self, model: Any) -> Any:
        pending = iter(self.bits)
        for node in model.graph.nodes:
            if node.target in WEIGHTED:
                bits = next(pending)
                specs = {node.args[0]: self.activation(bits.activation), node.args[1]: weight(bits.weight)}
                node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
            elif node.target is torch.ops.aten.clone.default:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    output_qspec=self.activation(END_BITS), _annotated=True
                )
        return model

    def activation(self, bits: int) -> QuantizationSpec:
        return QuantizationSpec(
            torch.uint8, self.observer.with_args(eps=2**-20), quant_min=0, quant_max=2**bits - 1,
            qscheme=torch.per_tensor_affine,
        )  # fmt: skip

    def validate(self, model: Any) -> None:
        pass


def weight(bits: int) -> QuantizationSpec:
    return QuantizationSpec(
        torch.int8, PerChannelMinMaxObserver.with_args(eps=2**-20), quant_min=-(2 ** (bits - 1)),
        quant_max=2 ** (bits - 1) - 1, qscheme=torch.per_channel_symmetric, ch_axis=0,
    )  # fmt: skip


def quantize(problem: Problem, observer: Any, settings: str) -> Result:
    model = prepare(problem.model, marker=Clone)
    bits = list(plan(model, problem.bits).values())
    dynamic = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (problem.calibration[:2],), dynamic_shapes=dynamic).module()
    prepared = prepare_pt2e(exported, Grids(bits, observer))
    with torch.no_grad():
        for batch in problem.batches():
            prepared(batch)
    converted: nn.Module = convert_pt2e(prepared)
    allow_exported_model_train_eval(converted)
    converted.eval()  # returns nothing
    return Result(converted, COMMON, settings)


METHODS: dict[str, Method] = {
    "histogram": partial(
        quantize, observer=HistogramObserver, settings="activations by histogram, weights by extremes"
    ),
    "minmax": partial(quantize, observer=MinMaxObserver, settings="activations and weights by extremes"),
}

if __name__ == "__main__":
    main(("torchao",), METHODS)
