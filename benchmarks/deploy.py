"""Exported files in ONNX Runtime and OpenVINO: bytes, kernels, agreement, latency: python -m benchmarks.deploy

Rows go to benchmarks/results/deploy.jsonl as they are measured, so that a run can be resumed; the tables
benchmarks/results/deploy.md are written from them. OpenVINO's columns need the extra openvino.
"""

import argparse
import platform
import tempfile
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import calque
from benchmarks.accuracy import SHARES
from benchmarks.common.measure import commit, outputs, same
from benchmarks.common.rows import RESULTS, Row, is_asked, measure_rows, read_rows
from benchmarks.common.shapes import ALL, SHAPES, measure_shapes, shape_lines
from benchmarks.common.tasks import SETTINGS, Setting, load, quantize, score
from calque.quantized.model import QuantizedModel
from calque.shipping.agreement import LEVELS, spread_of
from calque.shipping.latency import measure_latency
from calque.shipping.onnx import float_onnx
from calque.shipping.runtimes import DEFAULT, EXACT, Kernel, Target, open_runtime
from calque.shipping.saturation import saturates
from calque.shipping.verify import load_proto

RECIPE = "light"  # files are the same in kind whatever fitted them
PLANS = ("w8a8", "w7a8", "w4a8", "w4a4", "w2a4", "18%", "w4")
CALIBRATION = 64
TEST = 100  # of ImageNet, so that all rows take a quarter of an hour; the other networks' whole test sets
TARGETS: tuple[Target, ...] = ("onnxruntime", "openvino")
WEIGHTED = ("conv", "gemm", "matmul", "fullyconnected")  # in the names of kernels

FIELDS = ("network", "plan")
Key = tuple[str, str]  # network, plan


def cases() -> list[Key]:
    return [(SHAPES, ALL), *((setting.name, plan) for setting in SETTINGS for plan in PLANS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [SHAPES, *(setting.name for setting in SETTINGS)]
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--plans", nargs="+", default=[ALL, *PLANS], choices=[ALL, *PLANS])
    parser.add_argument("--rows", type=Path, default=RESULTS / "deploy.jsonl")
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    arguments = parser.parse_args()
    wanted = [key for key in cases() if is_asked(key, (arguments.networks, arguments.plans))]
    measure_rows(arguments.rows, FIELDS, wanted, measured, write_table, again=arguments.again)


def measured(network: str, plan: str) -> Row:
    facts: Row = {"network": network, "plan": plan, "commit": commit(), "machine": machine()}
    facts["versions"] = {name: version(name) for name in ("onnxruntime", "openvino") if find_spec(name)}
    return {**facts, **(measure_shapes() if network == SHAPES else bench_of(network).measure(plan))}


def machine() -> str:
    """The processor, whether it has VNNI, and the threads that torch has."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    name = next((line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")), "")
    vnni = "with" if "avx512_vnni" in facts or "avx_vnni" in facts else "without"
    return f"{name or platform.machine()} {vnni} VNNI, {torch.get_num_threads()} torch thread(s)"


@lru_cache(maxsize=1)
def bench_of(network: str) -> "Bench":
    """The network's bench; rows of one network stand together."""
    return Bench(next(setting for setting in SETTINGS if setting.name == network))


def write_table(rows: Path) -> None:
    rows.with_suffix(".md").write_text(table(list(read_rows(rows, FIELDS).values())), encoding="utf-8")


class Bench:
    """One network and its float file."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.task = load(setting.name)
        self.calibration = self.task.calibration[:CALIBRATION]
        self.test = self.task.test[: min(setting.test, TEST if setting.name.endswith("imagenet") else setting.test)]
        self.original: Any = None

    def measure(self, plan: str) -> Row:
        model = self.quantize(plan)
        if self.original is None:
            self.original = float_onnx(self.task.model, model)
        with tempfile.TemporaryDirectory() as folder:
            path = calque.export_onnx(model, Path(folder) / "model.onnx")
            proto, size = load_proto(path), path.stat().st_size
        simulated = outputs(model, self.test)
        exact, steps = traced(model, self.test)
        row: Row = {
            "ends": str(model.report.layers[0].bits), "metric": self.task.metric,
            "test": len(self.test), "layers": len(model.layers), "bytes": size, "ideal": model.report.size,
            "metadata": sum(len(entry.key) + len(entry.value) for entry in proto.metadata_props),
            "score": score(self.task, simulated),
        }  # fmt: skip
        for target in TARGETS:
            if find_spec(target):
                row[target] = self.run(proto, target, simulated, exact, steps)
        return row

    def run(self, proto: Any, target: Target, simulated: Tensor, exact: Tensor, steps: Tensor) -> Row:
        runtime = open_runtime(proto, target)
        received = torch.cat([runtime.run([part])[0] for part in torch.split(self.test, 10)])
        integer, weighted = weighted_kernels(runtime.kernels())
        distance = (received - exact).abs() / steps
        settings = EXACT if target == "onnxruntime" else DEFAULT
        latency = measure_latency(proto, self.original, [self.test[:1]], target, threads=1, exact=settings)
        return {
            "exact": same(received, exact), "simulated": same(received, simulated), "score": score(self.task, received),
            "mean_steps": distance.mean().item(), "largest_steps": distance.max().item(), "integer": integer,
            "weighted": weighted, "saturates": saturates(target), "milliseconds": latency.milliseconds,
            "ratio": latency.ratio, "exact_ratio": latency.exact_ratio, "load": latency.load_seconds,
            "float_load": latency.float_load_seconds,
        }  # fmt: skip

    def quantize(self, plan: str) -> QuantizedModel:
        """At 7-bit ends where a runtime's products saturate on this processor, but for w8a8, which shows what that does."""
        options: dict[str, Any] = {"bits": plan}
        if plan.endswith("%"):
            options = {"bits": SHARES, "budget": calque.Budget(size=plan)}
        elif "a" in plan:
            options["first_last"] = (
                "w7a8" if plan == "w7a8" or (plan != "w8a8" and saturates("onnxruntime")) else "w8a8"
            )
        return quantize(self.task.model, self.calibration, recipe=RECIPE, dynamic=self.setting.dynamic, **options)


def traced(model: QuantizedModel, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The exact evaluation's outputs, and the steps of their grid, which broadcast against them."""
    parts = [model.integer().trace(part) for part in torch.split(inputs, 10)]
    exact, step = torch.cat([part[0][0] for part in parts]), parts[0][2][0]
    return exact, spread_of(exact) / LEVELS if step is None else step


def weighted_kernels(kernels: list[Kernel]) -> tuple[int, int]:
    """How many kernels of layers with weights are integer ones, and how many there are."""
    named = [(kernel.operator.lower().replace("convert", ""), kernel) for kernel in kernels]
    found = [kernel for name, kernel in named if any(part in name for part in WEIGHTED)]
    return sum(kernel.precision == "integer" for kernel in found), len(found)


HEADINGS = ("plan", "ends", "bytes", "packed", "over", "allowed", "score PyTorch", "runtime", "score", "integer kernels",
            "= exact", "= simulated", "mean steps", "largest", "load s", "ms", "of float32", "of w8a8",
            "exact: of float32")  # fmt: skip
INTRODUCTION = f"""# Exported files in their runtimes

Written by `python -m benchmarks.deploy`: recipe {RECIPE}, placement `integer`, {CALIBRATION} calibration inputs; 18 %:
of the float32 bytes for the file, on {", ".join(SHARES)}; w4: weights alone. *packed*: codes at their bits, 12 bytes
per output channel, what stays float; *over*: the file without its metadata over that, *allowed*: 5 %,
1.5 kB per layer and 20 kB. *integer kernels*: of all convolutions and matrix products with weights. *= exact*, *=
simulated*: top-1 (for images: output
values) equal to the exact integer evaluation and to the PyTorch module; *steps*: distance to the exact evaluation in
steps of the output. Latency, on one thread: median of runs on one input in turns with the float32 file, both in default
sessions, and that ratio over w8a8's; *exact*: the ratio in a session with exact products (`session.x64quantprecision`,
`session.qdq_matmulnbits_accuracy_level` = 1), as agreement is measured. Processors with VNNI do not need the first, and take
slower kernels with it all the same. *ends* (first and last layer): 7-bit weights where the processor's products saturate,
which OpenVINO has no switch against; w8a8 shows what happens without. Tables whose machine is only `x86_64` are older: their
files are those of an older exporter, and their times were taken with exact products, beside other work, so that ratios count.
"""


def table(rows: list[Row]) -> str:
    """The rows as Markdown, a section for each network."""
    lines = [INTRODUCTION, *(line for row in rows if row["network"] == SHAPES for line in shape_lines(row))]
    for setting in SETTINGS:
        mine = {row["plan"]: row for row in rows if row["network"] == setting.name}
        if not mine:
            continue
        first = next(iter(mine.values()))
        facts = sorted({str(row[key]) for row in mine.values() for key in ("machine", "commit")})
        known = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        lines += [
            f"## {setting.name}", "", f"{first['test']} test inputs, {first['layers']} layers; {', '.join(facts)}; {known}.", "",
            "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS),
        ]  # fmt: skip
        for plan in PLANS:
            if plan in mine:
                lines += ["| " + " | ".join(cells) + " |" for cells in _cells(mine[plan], mine.get("w8a8"))]
        lines.append("")
    return "\n".join(lines)


def _cells(row: Row, wide: Row | None) -> list[list[str]]:
    """A line for each runtime; what concerns the file stands in the first."""
    over = row["bytes"] - row["metadata"] - row["ideal"]
    allowed = round(0.05 * row["ideal"] + 1500 * row["layers"] + 20_000)
    file = [row["plan"], row["ends"], f"{row['bytes']:,}", f"{row['ideal']:,}", f"{over:,}", f"{allowed:,}"]
    file.append(f"{row['score']:.2f}")
    lines: list[list[str]] = []
    for target in TARGETS:
        found = row.get(target)
        if found is None:
            continue
        beside = "" if wide is None or target not in wide else f"{found['ratio'] / wide[target]['ratio']:.2f}"
        lines.append([
            *(file if not lines else [""] * len(file)), target, f"{found['score']:.2f}",
            f"{found['integer']} of {found['weighted']}", f"{found['exact']:.2%}", f"{found['simulated']:.2%}",
            f"{found['mean_steps']:.2g}", f"{found['largest_steps']:.2g}", f"{found['load']:.2g}",
            f"{found['milliseconds']:.2f}", f"{found['ratio']:.2f}", beside, _optional(found.get("exact_ratio")),
        ])  # fmt: skip
    return lines


def _optional(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    main()
