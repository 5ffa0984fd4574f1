"""Rise of peak memory of `quantize` beside its budget: python -m benchmarks.memory

Rows go to benchmarks/results/memory.jsonl as they are measured, so that a run can be resumed; the table
benchmarks/results/memory.md is written from them. Each row is measured in a process of its own: freed memory of an earlier
one would hide a rise. Linux only (/proc).

Four networks with random weights show that the number of inputs does not matter: the rows of each have as many values, in few
large images or in many small ones. The others are the zoo's, and are measured where ../shared is.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.measure import commit, outputs, peak_bytes, reset_peak
from benchmarks.common.memory_models import MODELS, random_model
from benchmarks.common.rows import RESULTS, Row, measure_rows, read_rows
from benchmarks.common.tasks import SETTINGS, SHARED, load, quantize
from calque.run.spill import parse_bytes

BITS, RECIPE, RANDOM_RECIPE = "w4a4", "sequential", "fast"
WARM = 8  # images that the float network sees first: what the libraries allocate once is not the run's

Key = tuple[str, int, str]  # network, calibration images, memory
SIDES = {250: 96, 1000: 48, 4000: 24}  # of the random networks' images, by their number
RANDOM: tuple[Key, ...] = tuple((name, images, "500MB") for name in MODELS for images in SIDES)
CASES: tuple[Key, ...] = (
    *RANDOM,
    ("digits_depthwise", 256, "2GB"),
    ("mobilenet_v1_0.25_224_imagenet", 256, "500MB"),
    ("squeezenet1_1_imagenet", 1000, "1GB"),
    ("squeezenet1_1_imagenet", 1000, "2GB"),
)
FIELDS = ("network", "images", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = sorted({case[0] for case in (CASES if (SHARED / "zoo").is_dir() else RANDOM)})
    parser.add_argument("--networks", nargs="+", default=here)
    parser.add_argument("--images", type=int, help="in place of each row's number")
    parser.add_argument("--memory", help="in place of each row's budget")
    parser.add_argument("--rows", type=Path, default=RESULTS / "memory.jsonl")
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    parser.add_argument("--one", action="store_true", help="measure a single row here and print it")
    arguments = parser.parse_args()
    asked = [
        (name, arguments.images or images, arguments.memory or memory)
        for name, images, memory in CASES
        if name in arguments.networks
    ]
    if arguments.one:
        print(json.dumps(measure(*asked[0])))
        return
    measure_rows(arguments.rows, FIELDS, dict.fromkeys(asked), apart, table, again=arguments.again)


def apart(name: str, images: int, memory: str) -> Row:
    """The row, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", "--networks", name, "--images", str(images)]
    result = subprocess.run([*command, "--memory", memory], stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(result.stdout.splitlines()[-1])
    return row


def measure(name: str, images: int, memory: str) -> Row:
    model, calibration, dynamic, recipe = case(name, images)
    outputs(model, calibration[:WARM])
    before = reset_peak()
    started = time.perf_counter()
    result = quantize(model, calibration, bits=BITS, recipe=recipe, dynamic=dynamic, memory=memory)
    seconds = time.perf_counter() - started
    return {
        "network": name, "images": len(calibration), "memory": memory, "budget": parse_bytes(memory), "recipe": recipe,
        "rise": peak_bytes() - before, "seconds": seconds, "phases": result.report.phases, "commit": commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} torch thread(s)",
    }  # fmt: skip


def case(name: str, images: int) -> tuple[nn.Module, Tensor, dict[str, dict[int, Any]] | None, str]:
    """A network, its inputs, the axes that change, and the recipe."""
    if name in MODELS:
        side = SIDES[images]
        inputs = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
        return random_model(name), inputs, None, RANDOM_RECIPE
    setting = next(setting for setting in SETTINGS if setting.name == name)
    task = load(name)
    return task.model, task.calibration[:images].clone(), setting.dynamic, RECIPE


def table(path: Path) -> None:
    """Writes the rows as Markdown beside them."""
    rows = list(read_rows(path, FIELDS).values())
    lines = [
        "# Peak memory",
        "",
        "Written by `python -m benchmarks.memory`: the rise of the peak memory of one call of `calque.quantize` at",
        f"{BITS}, seed 0, each in a new process, beside the argument `memory`. The calibration inputs, the model and the",
        "libraries are there before and are not counted. Seconds include the spill to disk. The first four networks have random",
        f"weights and images of {', '.join(f'{side}x{side} ({count})' for count, side in SIDES.items())}.",
        "",
        "| network | images | memory | recipe | peak +MB | of the budget | seconds | machine | commit |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['network']} | {row['images']} | {row['memory']} | {row.get('recipe', RECIPE)} | {row['rise'] / 1e6:.0f} | "
            f"{row['rise'] / row['budget']:.2f} | {row['seconds']:.0f} | {row['machine']} | {row['commit']} |"
            for row in sorted(rows, key=lambda row: row["network"] not in MODELS)
        ),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
