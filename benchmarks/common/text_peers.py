"""Other tools on the float32 encoder, each at 8 bits and its own recommended settings.

ONNX Runtime's own quantization, dynamic and static, and NNCF's, on the exported file; torchao's on the module. Each function
gets both, calibration batches and a folder, and returns a file for ONNX Runtime or, where the tool has none, a module.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Peer = Callable[[nn.Module, onnx.ModelProto, list[Inputs], Path], onnx.ModelProto | nn.Module]


def dynamic_int8(module: nn.Module, model: onnx.ModelProto, calibration: list[Inputs], folder: Path) -> onnx.ModelProto:
    """int8 weights per channel; activations are put on grids of their own at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_written(model, folder), folder / "q.onnx", per_channel=True, weight_type=QuantType.QInt8)
    return onnx.load(folder / "q.onnx")


def static_int8(module: nn.Module, model: onnx.ModelProto, calibration: list[Inputs], folder: Path) -> onnx.ModelProto:
    """int8 weights per channel, uint8 activations from least and largest values, QDQ."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    names = [value.name for value in model.graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(names, (v.numpy() for v in batch.values()), strict=True))

    quantize_static(
        _written(model, folder), folder / "q.onnx", Reader(), per_channel=True, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"],
    )  # fmt: skip
    return onnx.load(folder / "q.onnx")


def nncf_int8(module: nn.Module, model: onnx.ModelProto, calibration: list[Inputs], folder: Path) -> onnx.ModelProto:
    """NNCF's post-training quantization for transformers, with its fast bias correction and SmoothQuant."""
    import nncf

    names = [value.name for value in model.graph.input]
    data = nncf.Dataset(calibration, lambda b: dict(zip(names, (v.numpy() for v in b.values()), strict=True)))
    result: onnx.ModelProto = nncf.quantize(
        model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
    )
    for node in result.graph.node:  # an attribute of opset 21, which NNCF writes into files of older ones as well
        if node.op_type == "QuantizeLinear":
            kept = [attribute for attribute in node.attribute if attribute.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend(kept)
    # at opset 21 ONNX Runtime's optimizer fails on it ("output_dtype INT8 does not match y_zero_point type UINT8")
    result.opset_import[0].version = min(result.opset_import[0].version, 20)
    return result


def torchao_int8(module: nn.Module, model: onnx.ModelProto, calibration: list[Inputs], folder: Path) -> nn.Module:
    """torchao: int8 weights per channel; activations are put on a grid per row at run time. It needs no calibration."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    result = copy.deepcopy(module)
    quantize_(result, Int8DynamicActivationInt8WeightConfig())
    return result


def _written(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "float.onnx"
    onnx.save(model, path)
    return path


PEERS: dict[str, Peer] = {
    "ort-dynamic": dynamic_int8,
    "ort-static": static_int8,
    "nncf": nncf_int8,
    "torchao": torchao_int8,
}
