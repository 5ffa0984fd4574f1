"""Measures the recipes fast and accurate in both placements, time included: python -m benchmarks.goals

Rows go to benchmarks/results/goals.jsonl as they are measured, so that a run can be resumed; benchmarks/results/goals.md is
written from them. Seconds are the processor's: other work on the machine makes them longer by its share of the caches only.
"""

import argparse
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measure import commit, fidelity, outputs
from benchmarks.common.rows import RESULTS, Row, is_asked, measure_rows, read_rows
from benchmarks.common.tasks import SETTINGS, load, quantize

ROWS = RESULTS / "goals.jsonl"
PASSES, CONSTANT = 15, 5  # the time that fast may take: float passes over the calibration inputs, and seconds
PLACEMENTS = ("inputs", "integer")
RECIPES = ("fast", "accurate")

FIELDS = ("network", "bits", "recipe", "placement", "seed")
Key = tuple[str, str, str, str, int]  # network, bits, recipe, placement, seed


@dataclass(frozen=True)
class Goal:
    """One network at one choice of bits: images to calibrate with, and the KL that each recipe should reach."""

    network: str
    bits: str
    images: int
    fast: float
    accurate: float  # a third less; resnet20 at W4A4: what 8-bit weights reach with the same activations

    def of(self, recipe: str) -> float:
        return self.fast if recipe == "fast" else self.accurate


GOALS = (
    Goal("resnet20_cifar10", "w4a4", 1024, 0.038, 0.033),
    Goal("resnet20_cifar10", "w2a4", 1024, 0.14, 0.093),
    Goal("squeezenet1_1_imagenet", "w4a4", 256, 0.24, 0.16),
    Goal("mobilenet_v1_0.25_224_imagenet", "w4a4", 1000, 1.00, 0.67),
    Goal("mobilenet_v1_0.25_224_imagenet", "w4a8", 1000, 0.15, 0.10),
    Goal("efficientnet_lite0_imagenet", "w4a4", 256, 0.30, 0.20),
)


def cases() -> list[Key]:
    """Every row, the most telling first."""
    settings = [(goal.network, goal.bits) for goal in GOALS]
    found = [(*setting, recipe, "inputs", 0) for recipe in RECIPES for setting in settings]
    found += [(*setting, "fast", "inputs", seed) for seed in (1, 2) for setting in settings]
    found += [(*setting, "accurate", "inputs", seed) for seed in (1, 2) for setting in settings[:2]]
    found += [(*setting, "fast", "integer", seed) for seed in (0, 1, 2) for setting in settings[:2]]
    found += [(*setting, recipe, "integer", 0) for recipe in RECIPES for setting in settings]
    found += [(*setting, "accurate", "inputs", seed) for seed in (1, 2) for setting in settings[2:]]
    found += [(*setting, recipe, "integer", seed) for recipe in RECIPES for seed in (1, 2) for setting in settings]
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=sorted({goal.network for goal in GOALS}))
    parser.add_argument("--bits", nargs="+")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    arguments = parser.parse_args()
    asked = (arguments.networks, arguments.bits, arguments.recipes, arguments.placements, arguments.seeds)
    wanted = [key for key in cases() if is_asked(key, asked)]
    measure_rows(arguments.rows, FIELDS, wanted, measured, write_table, again=arguments.again)


def measured(network: str, bits: str, recipe: str, placement: Any, seed: int) -> Row:
    goal = next(goal for goal in GOALS if (goal.network, goal.bits) == (network, bits))
    setting = next(setting for setting in SETTINGS if setting.name == network)
    task = load(network)
    calibration, test = task.calibration[: goal.images], task.test[: setting.test]
    outputs(task.model, calibration[:10])
    started = time.process_time()
    outputs(task.model, calibration)
    float_pass = time.process_time() - started
    started = time.process_time()
    model = quantize(
        task.model, calibration, bits=bits, recipe=recipe, placement=placement, seed=seed, dynamic=setting.dynamic
    )
    seconds = time.process_time() - started
    found = fidelity(outputs(task.model, test), outputs(model, test), task.classifier)
    distilled = model.report.distilled
    gained = (
        None if distilled is None else {"before": distilled.before, "after": distilled.after, "steps": distilled.steps}
    )
    return {
        "network": network, "bits": bits, "recipe": recipe, "placement": placement, "seed": seed, **found,
        "images": goal.images, "test": len(test), "seconds": seconds, "float_pass": float_pass, "distilled": gained,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "commit": commit(),
    }  # fmt: skip


def write_table(path: Path) -> None:
    """Writes the rows as Markdown beside them."""
    rows = list(read_rows(path, FIELDS).values())
    limit = f"{PASSES} passes + {CONSTANT} s"
    lines = [
        "# fast and accurate beside their goals",
        "",
        "Written by `python -m benchmarks.goals`. KL(float || quantized) in nats on test images, mean over the seeds and each",
        f"one; seconds of the processor for the whole call, mean, beside {limit} over the calibration images, the goal of",
        "`fast` (`accurate` is bounded by its minutes). *held out*: the loss that distillation is judged by, before and after,",
        "and its steps, of the first seed.",
        "",
        "| network | bits | images | recipe | placement | KL | goal | each seed | agreement | SQNR dB | seconds | passes | "
        f"{limit} | held out | machine | commit |",
        "|" + "---|" * 16,
    ]
    for goal in GOALS:
        for recipe in RECIPES:
            for placement in PLACEMENTS:
                wanted = (goal.network, goal.bits, recipe, placement)
                group = [
                    row for row in rows if (row["network"], row["bits"], row["recipe"], row["placement"]) == wanted
                ]
                if group:
                    lines.append(_line(goal, sorted(group, key=lambda row: row["seed"])))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(goal: Goal, group: list[Row]) -> str:
    first = group[0]

    def mean(name: str) -> float:
        return float(statistics.mean(row[name] for row in group))

    gained = first["distilled"]
    held_out = "" if gained is None else f"{gained['before']:.4f} to {gained['after']:.4f}, {gained['steps']} steps"
    cells = [
        goal.network, goal.bits, str(goal.images), first["recipe"], first["placement"], f"{mean('kl'):.4f}",
        f"{goal.of(first['recipe']):g}", ", ".join(f"{row['kl']:.4f}" for row in group), f"{100 * mean('agreement'):.1f}%",
        f"{mean('sqnr'):.2f}", f"{mean('seconds'):.1f}", f"{mean('seconds') / mean('float_pass'):.1f}",
        f"{PASSES * mean('float_pass') + CONSTANT:.1f}", held_out, f"{first['machine']}, {first['threads']} thread(s)",
        ", ".join(dict.fromkeys(row["commit"] for row in group)),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
