"""Other tools on the exported float32 encoder, each at 8 bits and its own recommended settings: a file for ONNX Runtime.

ONNX Runtime's own quantization, dynamic and static. Each function gets the float32 file, calibration batches and a folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

Inputs = dict[str, Tensor]
Peer = Callable[[onnx.ModelProto, list[Inputs], Path], onnx.ModelProto]


def dynamic_int8(model: onnx.ModelProto, calibration: list[Inputs], folder: Path) -> onnx.ModelProto:
    """int8 weights per channel; activations are put on grids of their own at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_written(model, folder), folder / "q.onnx", per_channel=True, weight_type=QuantType.QInt8)
    return onnx.load(folder / "q.onnx")


def static_int8(model: onnx.ModelProto, calibration: list[Inputs], folder: Path) -> onnx.ModelProto:
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


def nncf_int8(model: onnx.ModelProto, calibration: list[Inputs], folder: Path) -> onnx.ModelProto:
    """NNCF's post-training quantization for transformers, with its fast bias correction and SmoothQuant."""
    import nncf

    names = [value.name for value in model.graph.input]
    data = nncf.Dataset(calibration, lambda b: dict(zip(names, (v.numpy() for v in b.values()), strict=True)))
    result: onnx.ModelProto = nncf.quantize(
        model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
    )
    return result


def _written(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "float.onnx"
    onnx.save(model, path)
    return path


PEERS: dict[str, Peer] = {"ort-dynamic": dynamic_int8, "ort-static": static_int8, "nncf": nncf_int8}
