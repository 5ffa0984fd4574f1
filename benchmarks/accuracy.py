"""Measures recipes on real networks: python -m benchmarks.accuracy

Rows go to benchmarks/accuracy.jsonl as they are measured, so that a run can be stopped and goes on where it was; the table
benchmarks/accuracy.md is written from them. Rows of another version of the package are measured again with --fresh.
"""

import argparse
import json
import math
import platform
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
from benchmarks.tasks import SETTINGS, Setting, load, score
from calque.export import count_kernels, run_onnx

FOLDER = Path(__file__).resolve().parent
BITS = ("w8a8", "w4a8", "w4a4")
RECIPES = ("nearest", "sequential")
BATCH = 50

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=Path, default=FOLDER / "accuracy.jsonl")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that were measured before")
    arguments = parser.parse_args()
    if arguments.fresh:
        arguments.rows.unlink(missing_ok=True)
    measured = read_rows(arguments.rows)
    for setting in SETTINGS:
        wanted = [
            key
            for seed in arguments.seeds
            for bits in arguments.bits
            for recipe in arguments.recipes
            if (key := (setting.name, bits, recipe, seed)) not in measured
        ]
        if setting.name not in arguments.networks or not wanted:
            continue
        bench = Bench(setting)
        for _, bits, recipe, seed in wanted:
            row = bench.measure(bits, recipe, seed)
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    arguments.rows.with_suffix(".md").write_text(table(list(read_rows(arguments.rows).values())), encoding="utf-8")


def read_rows(path: Path) -> dict[tuple[str, str, str, int], Row]:
    """Rows by (network, bits, recipe, seed)."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {(row["network"], row["bits"], row["recipe"], row["seed"]): row for row in rows}


class Bench:
    """One network: its float outputs and the time of a float pass are measured once."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.task = load(setting.name)
        self.calibration = self.task.calibration[: setting.calibration]
        self.test = self.task.test[: setting.test]
        self.reference = outputs(self.task.model, self.test)

    def measure(self, bits: str, recipe: str, seed: int) -> Row:
        outputs(self.task.model, self.calibration[:BATCH])
        started = time.perf_counter()
        outputs(self.task.model, self.calibration)
        float_pass = time.perf_counter() - started
        before = reset_peak()
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", calque.errors.CalibrationWarning)  # the report has them
            model = calque.quantize(
                self.task.model,
                self.calibration,
                bits=bits,
                recipe=recipe,
                seed=seed,
                dynamic=self.setting.dynamic,
            )
        seconds = time.perf_counter() - started
        peak = peak_bytes() - before
        simulated = outputs(model, self.test)
        exact = outputs(model.integer(), self.test)
        with tempfile.TemporaryDirectory() as folder:
            path = calque.export_onnx(model, Path(folder) / "model.onnx")
            size = path.stat().st_size
            received = run_onnx(path, [self.test])
            integer, floats, _ = count_kernels(path)
        ideal = model.report.size
        return {
            "network": self.setting.name, "bits": bits, "recipe": recipe, "seed": seed,
            "calibration": len(self.calibration), "test": len(self.test), "metric": self.task.metric,
            "score_float": score(self.task, self.reference), "score": score(self.task, simulated),
            **fidelity(self.reference, simulated, self.task.classifier),
            "score_file": score(self.task, received),
            "file_exact": same(received, exact), "file_simulated": same(received, simulated),
            "bytes": size, "ideal": ideal, "allowed": round(1.05 * ideal + 1500 * len(model.layers) + 20_000),
            "integer_kernels": integer, "float_kernels": floats,
            "seconds": seconds, "passes": seconds / float_pass, "float_pass": float_pass, "peak": peak,
            "commit": commit(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }  # fmt: skip


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    size = BATCH if inputs[0].numel() < 50_000 else 10
    return torch.cat([model(batch) for batch in torch.split(inputs, size)])


def fidelity(reference: Tensor, quantized: Tensor, classifier: bool) -> Row:
    """KL(float || quantized) in nats, top-1 agreement, and the signal-to-noise ratio of the outputs in dB."""
    noise = (reference - quantized).double().square().mean().clamp(min=1e-30)
    sqnr = 10 * math.log10(reference.double().square().mean().item() / noise.item())
    if not classifier:
        return {"kl": None, "agreement": None, "sqnr": sqnr}
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(quantized.double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return {
        "kl": kl,
        "agreement": (reference.argmax(-1) == quantized.argmax(-1)).double().mean().item(),
        "sqnr": sqnr,
    }


def same(a: Tensor, b: Tensor) -> float:
    """Share of rows with the same top-1, or of equal values where the outputs are images."""
    if a.dim() == 2:
        return (a.argmax(1) == b.argmax(1)).double().mean().item()
    return torch.isclose(a, b, rtol=0, atol=1e-6).double().mean().item()


def reset_peak() -> int:
    """Resets this process's peak memory (Linux) and returns its resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_bytes() -> int:
    return status("VmHWM")


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=FOLDER, check=False
    )
    return result.stdout.strip() or "unknown"


HEADINGS = ("bits", "recipe", "score", "KL", "agreement", "SQNR dB", "file: score", "= exact", "= simulated", "bytes",
            "of ideal", "integer / float kernels", "seconds", "float passes", "peak +MB")  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as Markdown, a section for each network."""
    lines = [
        "# Accuracy at fixed bits",
        "",
        "Written by `python -m benchmarks.accuracy`; every row is one call of `calque.quantize` at the recipe's defaults",
        "and one exported file. KL(float || quantized) in nats and top-1 agreement with the float network;",
        "*= exact* and *= simulated*: top-1 (for images: output values) of ONNX Runtime equal to the exact integer",
        "evaluation and to the PyTorch simulation; *of ideal*: file bytes over packed codes, 12 bytes per channel and what",
        "stays float; *float passes*: seconds over those of one float pass over the same calibration inputs in the same run;",
        "*peak*: rise of peak memory over the moment before the call.",
        "Scores on these subsets compare float and quantized networks; they are not published benchmarks' accuracies.",
    ]
    for setting in SETTINGS:
        mine = [row for row in rows if row["network"] == setting.name]
        if not mine:
            continue
        first = mine[0]
        lines += [
            "",
            f"## {setting.name}",
            "",
            f"{first['calibration']} calibration inputs, {first['test']} test inputs; float {first['metric']} "
            f"{first['score_float']:.2f}; one float pass {first['float_pass']:.2f} s; {first['machine']}; "
            f"commit {values(mine, 'commit')}; seed {values(mine, 'seed')}.",
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|" + "---|" * len(HEADINGS),
            *("| " + " | ".join(cells(row)) + " |" for row in mine),
        ]
    return "\n".join(lines) + "\n"


def values(rows: list[Row], key: str) -> str:
    return ", ".join(sorted({str(row[key]) for row in rows}))


def cells(row: Row) -> list[str]:
    kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
    agreement = "" if row["agreement"] is None else f"{row['agreement']:.1%}"
    kernels = f"{sum(row['integer_kernels'].values())} / {sum(row['float_kernels'].values())}"
    return [
        row["bits"], row["recipe"], f"{row['score']:.2f}", kl, agreement, f"{row['sqnr']:.1f}", f"{row['score_file']:.2f}",
        f"{row['file_exact']:.2%}", f"{row['file_simulated']:.2%}", f"{row['bytes']:,}", f"{row['bytes'] / row['ideal']:.3f}",
        kernels, f"{row['seconds']:.1f}", f"{row['passes']:.0f}", f"{row['peak'] / 1e6:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
