"""Latency of ResNet-18's shapes, 224 x 224, beside the float32 file and ONNX Runtime's own quantizer, all in turns."""

import logging
import tempfile
from functools import partial
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor

import calque
from benchmarks.common.architectures import random_network
from benchmarks.common.rows import Row
from benchmarks.common.tasks import quantize
from calque.shipping.latency import in_turns
from calque.shipping.onnx import float_onnx
from calque.shipping.runtimes import DEFAULT, EXACT, OnnxRuntime
from calque.shipping.verify import load_proto

SHAPES, ALL = "ResNet-18", "all"
PLANS = ("w8a8", "w4a8", "w4a4")
FLOAT, STATIC = "float32", "quantize_static"
IMAGES = 4


def images() -> Tensor:
    """Smooth random images (N, 3, 224, 224): of white ones each is like the other, and the network does not tell them apart."""
    coarse = 2 * torch.randn(IMAGES, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=(224, 224), mode="bilinear")


def measure_shapes() -> Row:
    """Milliseconds of each file on one thread, in default sessions and in those with exact products."""
    model, inputs = random_network(SHAPES), images()
    files: dict[str, onnx.ModelProto] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for plan in PLANS:
            quantized = quantize(model, inputs, bits=plan, recipe="nearest")
            files[plan] = load_proto(calque.export_onnx(quantized, folder / "model.onnx"))
        files[FLOAT] = float_onnx(model, quantized)
        files[STATIC] = static(files[FLOAT], inputs, folder)
    keys = [(name, settings is EXACT) for name in files for settings in (DEFAULT, EXACT)]
    runtimes = [OnnxRuntime(files[name], 1, settings=EXACT if exact else DEFAULT) for name, exact in keys]
    times, runs = in_turns([partial(runtime.run, [inputs[:1]]) for runtime in runtimes])
    found = dict(zip(keys, times, strict=True))
    return {
        "runs": runs, "bytes": {name: file.ByteSize() for name, file in files.items()},
        "milliseconds": {name: found[name, False] for name in files},
        "exact_milliseconds": {name: found[name, True] for name in files},
    }  # fmt: skip


def static(file: onnx.ModelProto, inputs: Tensor, folder: Path) -> onnx.ModelProto:
    """The file as ONNX Runtime's own quantizer makes it: uint8 activations, int8 weights per channel."""
    source, target = folder / "float.onnx", folder / "static.onnx"
    onnx.save(file, source)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it advises on the root logger
    try:
        quantize_static(
            str(source), str(target), _Images(file.graph.input[0].name, inputs), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.getLogger().setLevel(level)
    return load_proto(target)


class _Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime's quantizer has no types
    def __init__(self, name: str, inputs: Tensor):
        self.rows = iter([{name: row[None].numpy()} for row in inputs])

    def get_next(self) -> dict[str, object] | None:
        return next(self.rows, None)


def shape_lines(row: Row) -> list[str]:
    """The row as a section of Markdown."""
    whole = row["milliseconds"][FLOAT]
    lines = [
        f"## Shapes of {SHAPES}, 224 x 224", "",
        f"Random weights, {IMAGES} smooth random images, recipe nearest; one input, one thread, {row['runs']} runs of all "
        f"files in turns; {row['machine']}, {row['commit']}; onnxruntime {row['versions']['onnxruntime']}. {STATIC}: ONNX "
        "Runtime's own quantizer, uint8 activations, int8 weights per channel.", "",
        "| file | bytes | ms | of float32 | exact: ms | exact: of float32 |", "|" + "---|" * 6,
    ]  # fmt: skip
    for name in row["milliseconds"]:
        plain, exact = row["milliseconds"][name], row["exact_milliseconds"][name]
        lines.append(
            f"| {name} | {row['bytes'][name]:,} | {plain:.2f} | {plain / whole:.2f} | {exact:.2f} | {exact / whole:.2f} |"
        )
    return [*lines, ""]
