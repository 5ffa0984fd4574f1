"""How time, memory and accuracy of the recipe fast go with the network and the images: python -m benchmarks.scale

Rows go to benchmarks/results/scale.jsonl as they are measured, so that a run can be resumed; the tables
benchmarks/results/scale.md are written from them. Each row is measured in a process of its own. Linux only (/proc).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.architectures import ARCHITECTURES, random_network
from benchmarks.common.measure import commit, fidelity, outputs, peak_bytes, reset_peak
from benchmarks.common.rows import RESULTS, Row, is_asked, measure_rows, read_rows
from benchmarks.common.tasks import load, quantize
from calque.fitting import closed_form, rounding

RECIPE = "fast"
BATCH = 10  # images of 224x224 that the float network sees at a time
DRAWS = 5
IMAGES = (1, 4, 16, 64, 256, 1000)
CURVES = {
    "resnet20_cifar10": ("w4a4", 1000),
    "squeezenet1_1_imagenet": ("w4a4", 400),
    "mobilenet_v1_0.25_224_imagenet": ("w4a4", 1300),
    "efficientnet_lite0_imagenet": ("w4a4", 200),
}  # bits and test images

FIELDS = ("network", "images", "draw")
OPTIONS: dict[str, Any] = {"recipe": RECIPE, "placement": "inputs"}
Key = tuple[str, int, int]  # network, images, draw


def cases() -> list[Key]:
    """What is measured, the most telling first."""
    found = [(name, images, 0) for images in (256, 64, 1000) for name in ARCHITECTURES]
    return found + [(name, images, draw) for name in CURVES for draw in range(DRAWS) for images in IMAGES]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=[*ARCHITECTURES, *CURVES], default=[*ARCHITECTURES, *CURVES])
    parser.add_argument("--images", type=int, nargs="+")
    parser.add_argument("--draws", type=int, nargs="+")
    parser.add_argument("--rows", type=Path, default=RESULTS / "scale.jsonl")
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    parser.add_argument("--one", action="store_true", help="measure a single row here and print it")
    arguments = parser.parse_args()
    asked = [key for key in cases() if is_asked(key, (arguments.networks, arguments.images, arguments.draws))]
    if arguments.one:
        print(json.dumps(measured(*asked[0])))
        return
    measure_rows(arguments.rows, FIELDS, asked, apart, write_tables, again=arguments.again)


def apart(network: str, images: int, draw: int) -> Row:
    """The row, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", "--networks", network]
    command += ["--images", str(images), "--draws", str(draw)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(result.stdout.splitlines()[-1])
    return row


def measured(name: str, images: int, draw: int) -> Row:
    row = scaling(name, images) if name in ARCHITECTURES else accuracy(name, images, draw)
    facts = {"network": name, "images": images, "draw": draw, "commit": commit()}
    return {**facts, "machine": f"{platform.machine()}, {torch.get_num_threads()} torch thread(s)", **row}


def scaling(name: str, images: int) -> Row:
    """Seconds, memory and rates of one call on random images."""
    model = random_network(name)
    calibration = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    outputs(model, calibration[:BATCH])
    started = time.process_time()
    outputs(model, calibration)
    float_pass = time.process_time() - started
    rate = matrix_rate()
    clock = MatrixClock()
    before = reset_peak()
    started = time.process_time()
    quantized = quantize(model, calibration, bits="w4a4", seed=0, **OPTIONS)
    seconds = time.process_time() - started
    return {
        "float_pass": float_pass, "seconds": seconds, "passes": seconds / float_pass, "peak": peak_bytes() - before,
        "phases": quantized.report.phases, "matrix_rate": rate, "matrix_seconds": clock.seconds,
        "matrix_flops": clock.operations,
    }  # fmt: skip


def accuracy(name: str, images: int, draw: int) -> Row:
    """KL on test images after one draw of calibration images."""
    task = load(name)
    bits, test = CURVES[name]
    order = torch.randperm(len(task.calibration), generator=torch.Generator().manual_seed(draw))
    chosen = task.calibration[order[:images]]
    started = time.process_time()
    quantized = quantize(task.model, chosen, bits=bits, seed=draw, **OPTIONS)
    seconds = time.process_time() - started
    reference, inputs = outputs(task.model, task.test[:test]), task.test[:test]
    return {"bits": bits, "test": test, "seconds": seconds, **fidelity(reference, outputs(quantized, inputs), True)}


def matrix_rate(size: int = 2048, runs: int = 3) -> float:
    """FLOP/s of a float32 matrix product on this machine with the threads that torch has, the best of some runs."""
    a, b = torch.randn(2, size, size)
    best = 0.0
    for _ in range(runs):
        started = time.process_time()
        a @ b
        best = max(best, 2 * size**3 / (time.process_time() - started))
    return best


class MatrixClock:
    """Seconds and floating-point operations of the solver's matrix phases, from now on in this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, float] = {}
        moments, metric = closed_form.Moments.of, rounding.Metric.of
        timed = (
            (closed_form.Moments, "of", "moments", moments, _moment_operations),
            (rounding.Metric, "of", "factorization", metric, _factor_operations),
            (closed_form, "gptq", "gptq", rounding.gptq, _rounding_operations),
            (closed_form, "descend", "descent", rounding.descend, _descent_operations),
        )
        for owner, attribute, name, function, count in timed:
            setattr(owner, attribute, self._timed(name, function, count))

    def _timed(self, name: str, function: Callable[..., Any], count: Callable[..., float]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.process_time()
            result = function(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
            self.operations[name] = self.operations.get(name, 0.0) + count(*arguments)
            return result

        return timed


def _moment_operations(x: Tensor, targets: Tensor) -> float:
    groups, rows, inputs = x.shape
    return 2.0 * groups * rows * inputs * (inputs + targets.shape[-1])


def _factor_operations(matrix: Tensor) -> float:
    """A Cholesky factorization and the inverse of its triangle: K^3 / 3 operations each."""
    return 2.0 * matrix.shape[0] * matrix.shape[1] ** 3 / 3


def _rounding_operations(metric: rounding.Metric, weight: Tensor, *_: Any) -> float:
    matrices, inputs, rows = weight.shape
    return float(matrices * inputs * inputs * rows)


def _descent_operations(metric: rounding.Metric, weight: Tensor, *_: Any) -> float:
    matrices, inputs, rows = weight.shape
    return 4.0 * matrices * inputs * inputs * rows


def write_tables(path: Path) -> None:
    """Writes the rows as Markdown beside them."""
    rows = list(read_rows(path, FIELDS).values())
    shapes = [row for row in rows if row["network"] in ARCHITECTURES]
    lines = [
        "# Scale",
        "",
        f"Written by `python -m benchmarks.scale`: recipe {RECIPE}, W4A4, placement `inputs`, each row in a new process.",
        "",
        "## Time and memory on 224x224 images",
        "",
        "Random weights and images, seed 0; seconds of the processor, all threads together, but for the phases, which are the",
        "clock's. *passes*: seconds over those of one float pass in the same process; the goal is 15 and 5 s. *peak*: rise of",
        "peak memory over the moment before the call, the inputs loaded. Matrix phases: seconds and GFLOP/s beside those of a",
        "2048 x 2048 float32 product in the same process.",
        "",
        "| network | images | float pass s | seconds | passes | 15 passes + 5 s | peak +MB | capture | fit | statistics | "
        "moments | factorization | GPTQ | descent | product GFLOP/s | machine | commit |",
        "|" + "---|" * 17,
        *(shape_cells(row) for row in shapes),
        "",
        "## KL against the number of calibration images",
        "",
        "Test KL(float || quantized) in nats, mean and standard deviation over the draws.",
        "",
        "| network | bits | images | draws | KL | deviation | over the last row | seconds | commit |",
        "|" + "---|" * 9,
        *curve_cells([row for row in rows if row["network"] in CURVES]),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def shape_cells(row: Row) -> str:
    spent, done = row["matrix_seconds"], row["matrix_flops"]
    kinds = ("moments", "factorization", "gptq", "descent")
    matrix = [f"{spent[kind]:.1f} s, {done[kind] / 1e9 / spent[kind]:.0f}" if kind in spent else "" for kind in kinds]
    phases = [f"{row['phases'].get(name, 0):.1f}" for name in ("capture", "fit", "statistics")]
    cells = [
        row["network"], str(row["images"]), f"{row['float_pass']:.1f}", f"{row['seconds']:.1f}", f"{row['passes']:.1f}",
        f"{15 * row['float_pass'] + 5:.1f}", f"{row['peak'] / 1e6:.0f}", *phases, *matrix,
        f"{row['matrix_rate'] / 1e9:.0f}", row["machine"], row["commit"],
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def curve_cells(rows: list[Row]) -> list[str]:
    lines = []
    for name in CURVES:
        by_images: dict[int, list[Row]] = {}
        for row in sorted((row for row in rows if row["network"] == name), key=lambda row: row["images"]):
            by_images.setdefault(row["images"], []).append(row)
        means = {images: statistics.mean(row["kl"] for row in group) for images, group in by_images.items()}
        for images, group in by_images.items():
            values = [row["kl"] for row in group]
            spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
            seconds = statistics.mean(row["seconds"] for row in group)
            commits = ", ".join(sorted({row["commit"] for row in group}))
            ratio = means[images] / means[max(means)]
            lines.append(
                f"| {name} | {group[0]['bits']} | {images} | {len(values)} | {means[images]:.4f} | {spread} | {ratio:.2f} | "
                f"{seconds:.0f} | {commits} |"
            )
    return lines


if __name__ == "__main__":
    main()
