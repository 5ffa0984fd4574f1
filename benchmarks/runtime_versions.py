"""Which release of ONNX Runtime reads which files: python -m benchmarks.runtime_versions [--folder FOLDER] [--releases ...]

Files are made once, in the environment that this runs in. Each release is installed in an environment of its own under FOLDER
(.runtimes), which is kept, with nothing but NumPy beside it, and runs all files there (benchmarks/runtime_probe.py). What the
files should return was computed by the exact integer evaluation, or where there is none by the quantized module.
The table benchmarks/results/runtime_versions.md is written whole from benchmarks/results/runtime_versions.jsonl.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

import calque
from benchmarks.common.rows import RESULTS, Row, measure_rows, read_rows

ROWS, TABLE = RESULTS / "runtime_versions.jsonl", RESULTS / "runtime_versions.md"
PROBE = Path(__file__).resolve().parent / "common" / "runtime_probe.py"
FIELDS = ("runtime", "file")
RELEASES = (
    "1.17.3", "1.18.1", "1.19.2", "1.20.1", "1.21.1", "1.22.1", "1.23.2", "1.24.4", "1.25.1", "1.26.0", "1.27.0", "1.28.0",
    "1.29.0", "1.30.0", "1.31.1", "1.32.0",
)  # fmt: skip
NUMPY_1 = ("1.17.3", "1.18.1")  # built before NumPy 2
PLACEMENTS: tuple[Literal["integer", "inputs"], ...] = ("integer", "inputs")
WEIGHTS, ACTIVATIONS, ALONE = (2, 3, 4, 8), (8, 4), ("w2", "w3", "w4", "w8", "w4g32", "w8g32")
OPSETS, IR_VERSIONS = range(18, 28), range(9, 15)
FLOAT, INT4 = TensorProto.FLOAT, TensorProto.INT4


class Residual(nn.Module):
    """Convolutions, a shortcut, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down, self.head = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Linear(12, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        x = F.relu(self.down(F.relu(self.conv(x)) + x))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def make_files(folder: Path) -> None:
    """Writes calque's files of all bits, and the smallest files of each opset, IR version and type."""
    torch.manual_seed(0)
    images, rows = torch.randn(64, 1, 8, 8), torch.randn(64, 64)
    convolutions = Residual().eval()
    linear = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    for placement, weight, activation in itertools.product(PLACEMENTS, WEIGHTS, ACTIVATIONS):
        bits = f"w{weight}a{activation}"
        q = calque.quantize(convolutions, images, bits=bits, recipe="nearest", placement=placement, first_last=None)
        write(folder / f"{bits}, {placement}", q, images, q.integer()(images))
    for bits in ALONE:
        q = calque.quantize(linear, rows, bits=bits, recipe="nearest", first_last=None)
        write(folder / bits, q, rows, q(rows))
    x = np.array([-1, 0, 2], dtype=np.float32)
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    for opset in OPSETS:
        probe(folder / f"opset {opset}", relu, x, np.maximum(x, 0), opset=opset, ir=8)
    for ir in IR_VERSIONS:
        probe(folder / f"IR version {ir}", relu, x, np.maximum(x, 0), opset=13, ir=ir)
    write_types(folder, x)


def write(path: Path, q: Any, inputs: Tensor, expected: Tensor) -> None:
    file = calque.export_onnx(q, path.with_suffix(".onnx"))
    name = onnx.load(file).graph.input[0].name
    save(path, {name: inputs.numpy(), "expected_0": expected.detach().numpy()})


def write_types(folder: Path, x: Any) -> None:
    codes, small = np.array([-8, 0, 7], dtype=np.float32), np.array([0, 3, 100], dtype=np.uint8)
    packed, scale = helper.make_tensor("w", INT4, [3], [-8, 0, 7]), helper.make_tensor("s", FLOAT, [], [0.5])
    add = helper.make_node("Add", ["x", "d"], ["y"])
    scaled = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), add]
    probe(folder / "INT4, DequantizeLinear", scaled, x, x + codes / 2, [packed, scale])
    cast = [
        helper.make_node("Cast", ["w"], ["c"], to=TensorProto.INT8),
        helper.make_node("Cast", ["c"], ["d"], to=FLOAT),
    ]
    probe(folder / "INT4, Cast", [*cast, add], x, x + codes, [packed])
    limit = helper.make_tensor("w", TensorProto.UINT8, [], [15])
    least = [helper.make_node("Min", ["x", "w"], ["y"])]
    probe(folder / "uint8, Min", least, small, np.minimum(small, 15), [limit], kind=TensorProto.UINT8)


def probe(
    path: Path, nodes: list[onnx.NodeProto], x: Any, expected: Any, constants: Sequence[TensorProto] = (), *,
    kind: int = FLOAT, opset: int = 21, ir: int = 10,
) -> None:  # fmt: skip
    """A file of these few nodes from x to y, of three values."""
    given, made = (helper.make_tensor_value_info(name, kind, [3]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "probe", [given], [made], list(constants))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    path.with_suffix(".onnx").write_bytes(proto.SerializeToString())
    save(path, {"x": x, "expected_0": expected})


def save(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **arrays)


def python_of(release: str, folder: Path) -> Path:
    """The Python of the environment that has this release; it is made where it is not there."""
    python, installed = folder / release / "bin" / "python", folder / release / "installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / release)], check=True)
        numpy = "numpy<2" if release in NUMPY_1 else "numpy"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"onnxruntime=={release}", numpy], check=True)
        installed.touch()
    return python


def rows_of(release: str, folder: Path, files: Path) -> list[Row]:
    """What becomes of each file in this release."""
    command = [str(python_of(release, folder)), str(PROBE), str(files)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def reads(row: Row | None) -> bool:
    """Whether the file ran and, as the runtime loads it, returned what it should."""
    return row is not None and "error" not in row and min(row["equal"]) == 1.0


def highest(rows: dict[tuple[Any, ...], Row], release: str, name: str, numbers: Iterable[int]) -> str:
    return str(max((number for number in numbers if reads(rows.get((release, f"{name} {number}")))), default="-"))


def table(rows: dict[tuple[Any, ...], Row]) -> list[str]:
    releases = [release for release in RELEASES if any(key[0] == release for key in rows)]
    mark = {True: "yes", False: "-"}
    columns = [*(f"{name}, {placement}" for name, placement in itertools.product(combined(), PLACEMENTS)), *ALONE]
    types = ("INT4, DequantizeLinear", "INT4, Cast", "uint8, Min")
    head = ["ONNX Runtime", "opset", "IR version", *types, *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for release in releases:
        cells = [highest(rows, release, "opset", OPSETS), highest(rows, release, "IR version", IR_VERSIONS)]
        cells += [mark[reads(rows.get((release, name)))] for name in (*types, *columns)]
        lines.append("| " + " | ".join([release, *cells]) + " |")
    return lines


def combined() -> list[str]:
    return [f"w{weight}a{activation}" for weight, activation in itertools.product(WEIGHTS, ACTIVATIONS)]


def write_table(path: Path) -> None:
    rows = read_rows(path, FIELDS)
    made = next(iter(rows.values()))["made"]
    least = min((row["equal_plain"][0] for row in rows.values() if reads(row)), default=0.0)
    lines = [
        "# Releases of ONNX Runtime and the files that they read", "",
        f"Written by `python -m benchmarks.runtime_versions`; files made with {made}.", "",
        "*yes*: the release loads the file and returns what the exact integer evaluation does (weights alone: the quantized",
        "module), in a session with exact products. *opset*, *IR version*: the highest that it loads. With graph optimization",
        f"off the files are read as well; at least {least:.1%} of the values are equal then.", "",
        *table(rows),
    ]  # fmt: skip
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="releases of ONNX Runtime and the files that they read")
    parser.add_argument("--folder", type=Path, default=Path(".runtimes"), help="where the environments are kept")
    parser.add_argument("--releases", nargs="+", default=list(RELEASES), choices=RELEASES)
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    arguments = parser.parse_args()
    made = ", ".join(f"{name} {version(name)}" for name in ("calque", "torch", "onnx")) + f" on {date.today()}"
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        make_files(files)
        found: dict[str, dict[str, Row]] = {}

        def measured(release: str, file: str) -> Row:
            if release not in found:
                found[release] = {row["file"]: row for row in rows_of(release, arguments.folder, files)}
            return {**found[release][file], "made": made}

        names = sorted(path.stem for path in files.glob("*.onnx"))
        keys = itertools.product(arguments.releases, names)
        measure_rows(ROWS, FIELDS, keys, measured, write_table, again=arguments.again)


if __name__ == "__main__":
    main()
