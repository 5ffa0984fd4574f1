"""Measures recipes on real networks: python -m benchmarks.accuracy

Rows go to benchmarks/results/accuracy.jsonl as they are measured, so that a run can be resumed; the table
benchmarks/results/accuracy.md is written from them. Rows of another version of the package are measured again with --again.
"""

import argparse
import platform
import tempfile
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import calque
from benchmarks.common.measure import BATCH, commit, fidelity, outputs, peak_bytes, reset_peak, same
from benchmarks.common.rows import RESULTS, Row, is_asked, measure_rows, read_rows
from benchmarks.common.tasks import SETTINGS, Setting, load, quantize, score
from calque.grid.bits import Bits
from calque.quantized.model import QuantizedModel
from calque.report import count_bits
from calque.shipping.verify import count_kernels, run_onnx

SHARES = ("w8a8", "w6a6", "w4a4", "w3a4", "w2a4")  # candidates under a budget in percent
UNIFORM = "bytes of w4a4"  # the budget of the uniform plan, whose ends have 8 bits in both
WEIGHTS = ("w8a4", "w6a4", "w4a4", "w3a4", "w2a4")  # its candidates

FIELDS = ("network", "bits", "recipe", "seed")
Key = tuple[str, str, str, int]  # network, bits or budget, recipe, seed


def cases() -> list[Key]:
    """What is measured, the most telling first."""
    main, fixed, first = "resnet20_cifar10", ("nearest", "light", "sequential", "advanced"), ("w4a4", "w2a4")
    rest = ("w8a8", "w4a8", "w3a3")
    budgets = [(UNIFORM, "advanced"), ("13%", "advanced"), ("18%", "advanced"), ("13%", "light"), ("18%", "light")]
    slowest = "efficientnet_lite0_imagenet"
    others = sorted((setting.name for setting in SETTINGS if setting.name != main), key=lambda name: name == slowest)
    found = [(main, bits, recipe, 0) for bits in first for recipe in fixed]
    found += [(main, budget, recipe, 0) for budget, recipe in budgets] + [(main, "w4a4", "paper-2021", 0)]
    for name in others:
        found += [(name, "w4a4", recipe, 0) for recipe in fixed] + [(name, UNIFORM, "advanced", 0)]
    found += [(main, bits, recipe, 0) for bits in rest for recipe in fixed]
    found += [(main, bits, "paper-2021", 0) for bits in ("w2a4", "w4a8")]
    for seed in (1, 2):
        found += [(main, bits, recipe, seed) for bits in (*first, *rest) for recipe in fixed]
        found += [(main, budget, recipe, seed) for budget, recipe in budgets]
    found += [(name, "18%", recipe, 0) for name in others for recipe in ("light", "advanced")]
    found += [
        (name, bits, recipe, 0) for name in others for bits in ("w8a8", "w4a8") for recipe in ("nearest", "sequential")
    ]
    found += [(main, bits, "fast", seed) for seed in (0, 1, 2) for bits in (*first, *rest)]
    found += [(name, "w4a4", "fast", 0) for name in others]
    found += [(main, bits, "accurate", 0) for bits in first] + [(name, "w4a4", "accurate", 0) for name in others]
    found += [(main, bits, "accurate", seed) for seed in (1, 2) for bits in first]
    found += [(main, share, "fast", seed) for seed in (0, 1, 2) for share in ("13%", "18%")]
    return found + [(name, "18%", "fast", 0) for name in others]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--bits", nargs="+", help="bits and budgets, of those in the table")
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--rows", type=Path, default=RESULTS / "accuracy.jsonl")
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    arguments = parser.parse_args()
    asked = (arguments.networks, arguments.bits, arguments.recipes, arguments.seeds)
    wanted = [key for key in cases() if is_asked(key, asked)]
    measure_rows(arguments.rows, FIELDS, wanted, measured, write_table, again=arguments.again)


def measured(network: str, *case: Any) -> Row:
    return bench_of(network).measure(*case)


@lru_cache(maxsize=1)
def bench_of(network: str) -> "Bench":
    """The network's bench; rows of one network stand together."""
    return Bench(next(setting for setting in SETTINGS if setting.name == network))


def write_table(rows: Path) -> None:
    rows.with_suffix(".md").write_text(table(list(read_rows(rows, FIELDS).values())), encoding="utf-8")


class Bench:
    """One network: its float outputs and the time of a float pass are measured once."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.task = load(setting.name)
        self.calibration = self.task.calibration[: setting.calibration]
        self.test = self.task.test[: setting.test]
        self.reference = outputs(self.task.model, self.test)

    def measure(self, bits: str, recipe: str, seed: int) -> Row:
        options = self.options(bits)
        outputs(self.task.model, self.calibration[:BATCH])
        started = time.perf_counter()
        outputs(self.task.model, self.calibration)
        float_pass = time.perf_counter() - started
        before = reset_peak()
        started = time.perf_counter()
        model = self.quantize(recipe=recipe, seed=seed, **options)
        seconds = time.perf_counter() - started
        peak = peak_bytes() - before
        simulated = outputs(model, self.test)
        ideal = model.report.size
        chosen = next((asdict(finalist) for finalist in model.report.finalists if finalist.chosen), {})
        return {
            "network": self.setting.name, "bits": bits, "recipe": recipe, "seed": seed,
            "calibration": len(self.calibration), "test": len(self.test), "metric": self.task.metric,
            "score_float": score(self.task, self.reference), "score": score(self.task, simulated),
            **fidelity(self.reference, simulated, self.task.classifier),
            **self.file(model, simulated),
            "ideal": ideal, "share": ideal / model.report.float_size, "plan": count_bits(map(str, layer_bits(model))),
            "loss": model.report.loss, "predicted": chosen.get("predicted"), "measured": chosen.get("measured"),
            "finalists": [[count_bits(f.plan.values()), f.size, f.predicted, f.measured] for f in model.report.finalists],
            "seconds": seconds, "passes": seconds / float_pass, "float_pass": float_pass, "peak": peak,
            "phases": model.report.phases, "tuned": model.report.tuned,
            "commit": commit(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }  # fmt: skip

    def options(self, bits: str) -> dict[str, Any]:
        """What the label of a row stands for, as arguments of `quantize`."""
        if bits == UNIFORM:
            size = self.quantize(bits="w4a4", recipe="nearest", seed=0).report.file_size
            return {"bits": WEIGHTS, "budget": calque.Budget(size=size), "first_last": "w8a8"}
        if bits.endswith("%"):
            return {"bits": SHARES, "budget": calque.Budget(size=bits)}
        return {"bits": bits}

    def quantize(self, **options: Any) -> QuantizedModel:
        return quantize(self.task.model, self.calibration, dynamic=self.setting.dynamic, **options)

    def file(self, model: QuantizedModel, simulated: Tensor) -> Row:
        """The exported file beside the simulation; nothing where a width cannot be exported yet."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = calque.export_onnx(model, Path(folder) / "model.onnx")
            except calque.errors.ExportError:
                return {"score_file": None}
            received = run_onnx(path, [self.test])
            integer, floats, _ = count_kernels(path)
            exact = outputs(model.integer(), self.test)
            return {
                "score_file": score(self.task, received), "file_exact": same(received, exact),
                "file_simulated": same(received, simulated), "bytes": path.stat().st_size,
                "integer_kernels": integer, "float_kernels": floats,
            }  # fmt: skip


def layer_bits(model: QuantizedModel) -> list[Bits]:
    return [model.plan[layer.name] for layer in model.report.layers]


HEADINGS = ("bits or budget", "recipe", "seed", "score", "KL", "agreement", "SQNR dB", "layers", "bytes", "of float32",
            "loss: predicted", "measured", "file: score", "= exact", "= simulated", "file bytes", "integer / float kernels",
            "seconds", "float passes", "peak +MB")  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as Markdown, a section for each network."""
    lines = [
        "# Accuracy at fixed bits and under budgets",
        "",
        "Written by `python -m benchmarks.accuracy`; every row is one call of `calque.quantize` at the recipe's defaults",
        "and, where all bits can be exported, one file. KL(float || quantized) in nats and top-1 agreement with the float",
        "network on test inputs. Budgets bound the file by a share of the float32 bytes, with the candidates "
        + ", ".join(SHARES)
        + ";",
        f"*{UNIFORM}*: the file's bytes of the uniform plan with 8-bit ends, which stay, and the candidates {', '.join(WEIGHTS)}",
        "for the other layers. At fixed bits the recipe advanced is sequential with biases tuned. *loss*: rise over the base",
        "precision on calibration inputs, the sum of the prices and as the network was built. *bytes*: packed codes,",
        "12 bytes per channel and what stays float. *= exact*, *= simulated*: top-1 (for images: output values) of ONNX",
        "Runtime equal to the exact integer evaluation and to the PyTorch simulation. *float passes*: seconds over those of",
        "one float pass over the same calibration inputs in the same run; *peak*: rise of peak memory over the moment before",
        "the call.",
        "Scores on these subsets compare float and quantized networks; they are not published benchmarks' accuracies.",
    ]
    for setting in SETTINGS:
        mine = sorted((row for row in rows if row["network"] == setting.name), key=order)
        if not mine:
            continue
        first = mine[0]
        lines += [
            "",
            f"## {setting.name}",
            "",
            f"{first['calibration']} calibration inputs, {first['test']} test inputs; float {first['metric']} "
            f"{first['score_float']:.2f}; one float pass {first['float_pass']:.2f} s; {values(mine, 'machine')}; "
            f"commit {values(mine, 'commit')}.",
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|" + "---|" * len(HEADINGS),
            *("| " + " | ".join(cells(row)) + " |" for row in mine),
        ]
        done = {(row["bits"], row["recipe"], row["seed"]) for row in mine}
        left = [f"{key[1]} {key[2]}" for key in cases() if key[0] == setting.name and key[1:] not in done]
        if left:
            lines += ["", f"Left out for time: {', '.join(left)}."]
    return "\n".join(lines) + "\n"


def order(row: Row) -> tuple[object, ...]:
    bits = ("w8a8", "w4a8", "w4a4", UNIFORM, "w3a3", "w2a4", "18%", "13%")
    recipes = ("nearest", "light", "fast", "accurate", "sequential", "advanced", "paper-2021")
    return bits.index(row["bits"]), recipes.index(row["recipe"]), row["seed"]


def values(rows: list[Row], key: str) -> str:
    return ", ".join(sorted({str(row[key]) for row in rows}))


def cells(row: Row) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    kernels = ""
    if "integer_kernels" in row:
        kernels = f"{sum(row['integer_kernels'].values())} / {sum(row['float_kernels'].values())}"
    return [
        row["bits"], row["recipe"], str(row["seed"]), f"{row['score']:.2f}", shown("kl", ".4f"), shown("agreement", ".1%"),
        f"{row['sqnr']:.1f}", row["plan"], f"{row['ideal']:,}", f"{row['share']:.1%}", shown("predicted", ".4f"),
        shown("measured", ".4f"), shown("score_file", ".2f"), shown("file_exact", ".2%"), shown("file_simulated", ".2%"),
        shown("bytes", ","), kernels, f"{row['seconds']:.1f}", f"{row['passes']:.0f}", f"{row['peak'] / 1e6:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
