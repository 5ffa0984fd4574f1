"""Which networks are captured, quantized and exported: python -m benchmarks.coverage

The smallest members of families of timm and transformers, with random weights; needs both packages, in an environment of its
own (pip install torch torchvision timm transformers). Rows go to benchmarks/results/coverage.jsonl as they are measured, each
in a process of its own, so that a run can be resumed; the table benchmarks/results/coverage.md is written from them.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import calque
from benchmarks.common.coverage_models import TIMM, TRANSFORMERS, timm_model, transformers_model
from benchmarks.common.measure import commit
from benchmarks.common.rows import RESULTS, Row, is_asked, measure_rows, read_rows
from benchmarks.common.tasks import quantize
from benchmarks.text import noise
from calque.errors import CaptureError
from calque.network import Signature, capture
from calque.network.signature import flatten
from calque.quantized.model import QuantizedModel
from calque.quantized.partly import PartlyQuantized
from calque.recipe import NEAREST, Ranges
from calque.shipping.runtimes import open_runtime

FIELDS = ("library", "name")
# What is measured is whether it works: ranges from least and largest values take the least time.
RECIPE = replace(NEAREST, name="minmax", ranges=Ranges("minmax", "minmax", "minmax"))
ROWS = 4
LIMIT = 1800  # seconds for one network
CLOSE = (
    25.0  # decibels between runtime and simulation: single codes part at rounding edges, and random networks amplify it
)
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.Embedding,
            nn.EmbeddingBag, nn.Bilinear, nn.RNNBase)  # fmt: skip
LIBRARIES: dict[str, tuple[tuple[str, ...], Callable[[str], tuple[nn.Module, Any]], str]] = {
    "timm": (TIMM, timm_model, "inputs"),
    "transformers": (TRANSFORMERS, transformers_model, "inputs"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--rows", type=Path, default=RESULTS / "coverage.jsonl")
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "NAME"), help="measure a single row here and print it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(*arguments.one)))
        return
    keys = [(library, name) for library, (names, _, _) in LIBRARIES.items() for name in names]
    wanted = [key for key in keys if is_asked(key, (arguments.libraries, arguments.names))]
    measure_rows(arguments.rows, FIELDS, wanted, apart, write_table, again=arguments.again)


def apart(library: str, name: str) -> Row:
    """The row, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.coverage", "--one", library, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"library": library, "name": name, "commit": commit(), "failed": "timeout", "reason": f"{LIMIT} seconds"}
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return {"library": library, "name": name, "commit": commit(), "failed": "process", "reason": last[:300]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measured(library: str, name: str) -> Row:
    """How far the network gets; the first step that fails, with its reason."""
    row: Row = {"library": library, "name": name, "commit": commit(), "version": version(library)}
    step, started = "build", time.perf_counter()
    try:
        torch.manual_seed(0)
        model, batch = LIBRARIES[library][1](name)
        model = model.eval()
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        row["found"] = sum(isinstance(part, WEIGHTED) or type(part).__name__ == "Conv1D" for part in model.modules())
        step = "capture"
        with suppress(CaptureError):  # quantized in parts, or refused once more
            row |= difference(model, batch)
            step = "quantize"
        q = quantize(model, batch, bits="w8a8", recipe=RECIPE, placement=LIBRARIES[library][2])
        row |= {"quantized": len({part.partition("#")[0] for part in q.layers}), "operands": len(q.quantizers)}
        if isinstance(q, PartlyQuantized):
            row |= {"parts": len(q.parts), "left_float": [without_paths(q.report.notes[0])] if q.report else []}
        else:
            row["left_float"] = list(q.facts.left_float)
        step = "export"
        files = [(part, inputs, exported(part)) for part, inputs in wholes(q, batch)]
        row["bytes"] = sum(len(proto.SerializeToString()) for _, _, proto in files)
        step = "runtime"
        row["runtime"] = min(agreement(*file) for file in files)
        if row["runtime"] < CLOSE:
            row |= {"failed": step, "reason": f"{row['runtime']:.1f} dB between ONNX Runtime and PyTorch"}
    except Exception as error:
        text = " ".join(str(error).split()) or traceback.format_exc().splitlines()[-1]
        row |= {"failed": step, "reason": f"{type(error).__name__}: {without_paths(text)[:300]}"}
    return row | {"seconds": time.perf_counter() - started}


@torch.no_grad()
def wholes(q: QuantizedModel, batch: Any) -> list[tuple[QuantizedModel, Any]]:
    """What is exported as one file, with its inputs: the network, or each part as the network calls it first."""
    if not isinstance(q, PartlyQuantized):
        return [(q, batch)]
    found: dict[QuantizedModel, Any] = {}

    def record(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(part, QuantizedModel)
        found.setdefault(part, part.signature.bind(args, kwargs))

    handles = [part.register_forward_pre_hook(record, with_kwargs=True) for part in q.parts.values()]
    q(**batch)
    for handle in handles:
        handle.remove()
    return list(found.items())


def without_paths(sentence: str) -> str:
    """The sentence with files named from their package on."""
    return re.sub(r'File "[^"]*/site-packages/', 'File "', sentence)


def exported(q: QuantizedModel) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        return onnx.load(calque.export_onnx(q, Path(folder) / "model.onnx"))


@torch.no_grad()
def agreement(q: QuantizedModel, batch: Any, proto: onnx.ModelProto) -> float:
    """The least distance of an output in ONNX Runtime from PyTorch's, in decibels."""
    received = open_runtime(proto, "onnxruntime").run([leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)])
    expected = [leaf for leaf in pytree.tree_leaves(q(**batch)) if isinstance(leaf, Tensor)]
    return min(noise(a, b) for a, b in zip(expected, received, strict=True) if a.is_floating_point())


@torch.no_grad()
def difference(model: nn.Module, batch: Any) -> Row:
    """The largest difference of the captured network's outputs from the model's, over the largest output."""
    signature = Signature.of(model)
    named = signature.batch(batch)
    network = capture(model, named)
    expected = [
        leaf for leaf in pytree.tree_leaves(model(**named)) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    found = [
        leaf for leaf in network.module(*flatten(named)[0]) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    shares = [(a - b).abs().max() / a.abs().max().clamp(min=1e-12) for a, b in zip(expected, found, strict=True)]
    return {"difference": max(share.item() for share in shares), "unreached": list(network.unreached)}


HEADINGS = ("library", "network", "parameters", "captured", "largest difference", "layers quantized", "of", "exported",
            "runtime dB", "what fails, and why; what stays float")  # fmt: skip
STEPS = ("build", "process", "timeout", "capture", "quantize", "export", "runtime")


def write_table(path: Path) -> None:
    """Writes the rows as Markdown beside them."""
    rows = list(read_rows(path, FIELDS).values())
    lines = [
        "# Coverage",
        "",
        f"Written by `python -m benchmarks.coverage`: random weights, {ROWS} random inputs, W8A8, ranges from least and largest "
        "values, placement `inputs`. *largest difference*: of the captured network's outputs from the model's, over the largest "
        "output, nothing quantized. *layers quantized* of the convolutions, linear layers, embeddings and recurrent layers among "
        "the modules; more, where matrices are multiplied without one. *runtime*: power of the quantized network's outputs in "
        f"PyTorch over that of their distance to ONNX Runtime's; at least {CLOSE:.0f} dB counts as agreement.",
        "",
        *(_summary(library, [row for row in rows if row["library"] == library]) for library in LIBRARIES),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def _passed(row: Row, step: str) -> bool:
    return "failed" not in row or STEPS.index(row["failed"]) > STEPS.index(step)


def _captured(row: Row) -> str:
    return f"in {row['parts']} parts" if "parts" in row else "yes" if _passed(row, "capture") else "no"


def _summary(library: str, rows: list[Row]) -> str:
    counts = {step: sum(_passed(row, step) for row in rows) for step in ("capture", "quantize", "export", "runtime")}
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    parts = sum("parts" in row for row in rows)
    return (
        f"- {library}: {len(rows)} networks, {counts['capture']} captured ({parts} of them in parts), {counts['quantize']} "
        f"quantized, {counts['export']} exported, {counts['runtime']} agree in ONNX Runtime ({commits})."
    )


def _cells(row: Row) -> list[str]:
    def shown(field: str, form: str) -> str:
        return format(row[field], form) if field in row else ""

    remarks = [f"{row['failed']}: {row['reason']}"] if "failed" in row else []
    remarks += [sentence for sentence in row.get("left_float", ()) if "_norm" not in sentence]
    remarks += [f"{len(row['unreached'])} layers unreached"] if row.get("unreached") else []
    return [
        row["library"], row["name"], shown("parameters", ","), _captured(row),
        shown("difference", ".0e"), shown("quantized", "d"), shown("found", "d"), "yes" if _passed(row, "export") else "no",
        shown("runtime", ".0f"), "; ".join(remarks).replace("|", "/"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
