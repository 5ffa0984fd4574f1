"""The deployment benchmark: what counts as a kernel with weights, rows, and their table."""

import json
from pathlib import Path

import pytest
from benchmarks.common.rows import read_rows
from benchmarks.common.shapes import ALL, SHAPES, shape_lines
from benchmarks.common.tasks import SETTINGS
from benchmarks.deploy import FIELDS, PLANS, Bench, cases, machine, table, weighted_kernels, write_table

from calque.shipping.runtimes import Kernel
from slow import slow


def test_every_network_is_measured_at_every_plan() -> None:
    assert set(cases()) == {(SHAPES, ALL)} | {(setting.name, plan) for setting in SETTINGS for plan in PLANS}


def test_kernels_with_weights_are_counted_and_conversions_are_not() -> None:
    kernels = [
        Kernel("QLinearConv", "integer", ()), Kernel("Convolution", "integer", ()), Kernel("Convert", "neutral", ()),
        Kernel("FullyConnected", "float", ()), Kernel("MatMulNBits", "float", ()), Kernel("Relu", "float", ()),
    ]  # fmt: skip

    assert weighted_kernels(kernels) == (2, 4)


@pytest.mark.parametrize("plan", ["w4a4", slow("w4")])
def test_a_row_is_measured_and_reads_as_a_line_for_each_runtime(tmp_path: Path, plan: str) -> None:
    bench = Bench(next(setting for setting in SETTINGS if setting.name == "digits_mlp"))
    path = tmp_path / "deploy.jsonl"
    row = {
        "network": "digits_mlp",
        "plan": plan,
        "commit": "0",
        "machine": machine(),
        "versions": {},
        **bench.measure(plan),
    }
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")

    write_table(path)

    found = row["onnxruntime"]
    assert found["exact"] >= 0.99
    assert min(found["ratio"], found["exact_ratio"]) > 0
    assert (found["integer"], found["weighted"]) == ((3, 3) if plan == "w4a4" else (0, 3))
    assert row["bytes"] - row["metadata"] - row["ideal"] <= 0.05 * row["ideal"] + 1500 * row["layers"] + 20_000
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == table(list(read_rows(path, FIELDS).values()))
    assert f"| {plan} |" in text
    assert text.count("onnxruntime |") == 1


def test_shapes_read_as_a_line_for_each_file_with_both_ratios() -> None:
    times = {"float32": 30.0, "w8a8": 10.0}
    row = {
        "network": SHAPES, "plan": ALL, "commit": "0", "machine": machine(), "versions": {"onnxruntime": "1"}, "runs": 3,
        "bytes": {"float32": 1000, "w8a8": 250}, "milliseconds": times,
        "exact_milliseconds": {"float32": 30.0, "w8a8": 24.0},
    }  # fmt: skip

    assert "| w8a8 | 250 | 10.00 | 0.33 | 24.00 | 0.80 |" in shape_lines(row)
    assert "\n".join(shape_lines(row)) in table([row])
