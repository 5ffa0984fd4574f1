"""A measured table of latencies: what a layer's own work is, which entries a budget needs, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.allocation.budget import read_latency
from calque.errors import SpecError
from calque.grid.bits import Bits
from calque.network import Geometry
from calque.quantized.model import QuantizedModel
from calque.shipping import table
from calque.shipping.alone import Alone, write_alone
from calque.shipping.runtimes import DEFAULT, OnnxRuntime
from calque.shipping.surroundings import Standing, alone, standings
from calque.shipping.table import LatencyTable, latency_table
from calque.shipping.verify import load_proto
from slow import slow

CONVOLUTION = Geometry("convolution", padding=(1, 1, 1, 1))
SQUARE = (CONVOLUTION, (8, 8, 3, 3), (1, 8, 8, 8))
DENSE = (Geometry("linear"), (64, 32), (1, 5, 32))


@pytest.fixture(scope="module")
def q(trained: nn.Module, calibration: Tensor) -> QuantizedModel:
    return calque.quantize(trained, calibration, bits="w8a8", recipe="nearest")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LEAST_RUNS", 3)
    monkeypatch.setattr(table, "MOST_RUNS", 3)


def kernels(case: Alone) -> list[str]:
    proto, feeds = write_alone(case)
    runtime = OnnxRuntime(proto, 1, settings=DEFAULT)
    runtime.run([torch.from_numpy(value) for value in feeds.values()])
    return [kernel.operator for kernel in runtime.kernels() if kernel.operator not in table.LAYOUT]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Alone(*SQUARE, "integer", codes=True, result=True), ["QLinearConv"]),
        (Alone(*SQUARE, "integer", codes=True, narrow=True, result=True), ["Min", "QLinearConv"]),
        (
            Alone(*SQUARE, "integer", codes=True, again=True, narrow=True, result=True),
            ["DequantizeLinear", "QuantizeLinear", "Min", "QLinearConv"],
        ),
        (Alone(*SQUARE, "integer", result=True), ["QuantizeLinear", "QLinearConv"]),
        (Alone(*SQUARE, "float", result=True), ["Conv", "QuantizeLinear"]),
        (Alone(*DENSE, "integer", codes=True), ["QGemm"]),
        (Alone(*DENSE, "integer", narrow=True, result=True), ["QuantizeLinear", "Min", "QGemm"]),
        (Alone(*DENSE, "float"), ["Gemm"]),
        (Alone(*DENSE, "fused", 4), ["MatMulNBits"]),
        (Alone(*DENSE, "grouped", 8, 16), ["MatMulNBits"]),
        (Alone(Geometry("embedding"), (9, 4), (1, 5), "integer"), ["Gather", "Gather", "Cast", "Mul"]),
        (Alone(Geometry("embedding"), (9, 4), (1, 5), "float"), ["Gather"]),
    ],
)
def test_a_layer_alone_runs_the_kernels_of_the_network_and_what_its_choice_puts_in_front(
    case: Alone, expected: list[str]
) -> None:
    assert kernels(case) == expected


@pytest.mark.parametrize("bits", ["w8a8", slow("w4a4"), slow("w2a8"), "w4"])
def test_all_layers_alone_have_the_weighted_kernels_of_the_exported_network(
    tmp_path: Path, trained: nn.Module, calibration: Tensor, bits: str
) -> None:
    model = calque.quantize(trained, calibration, bits=bits, recipe="nearest", first_last=None)
    proto = load_proto(calque.export_onnx(model, tmp_path / "model.onnx"))
    weighted = ("QLinearConv", "QGemm", "MatMulNBits", "Conv", "FusedConv", "Gemm")
    known = [k.operator.replace("Fused", "") for k in OnnxRuntime(proto, 1, settings=DEFAULT).kernels()]

    found = [
        operator
        for standing in standings(model, [calibration[:1]])
        for operator in kernels(alone(standing, standing.bits))
        if operator in weighted
    ]

    assert sorted(found) == sorted(operator for operator in known if operator in weighted)


def test_a_layers_surroundings_are_seen(q: QuantizedModel, calibration: Tensor) -> None:
    found = {standing.name: standing for standing in standings(q, [calibration[:2]])}

    assert list(found) == list(q.layers)
    assert found["stem"].x == (2, 1, 8, 8)
    assert not found["stem"].codes  # the image is quantized in front of it
    assert found["conv1"].codes
    assert found["conv1"].shared  # the shortcut reads its input, too
    assert not found["conv2"].shared
    assert [name for name, standing in found.items() if not standing.result] == ["head"]  # logits stay real numbers


def test_bits_are_what_a_budget_asks_for(short: None, q: QuantizedModel, calibration: Tensor, tmp_path: Path) -> None:
    candidates = ("w8a8", "w4a4", "w2a4")
    measured = latency_table(q, calibration, bits=candidates)
    measured.save(tmp_path / "table.csv")
    limit = measured.total({name: "w8a8" for name in q.layers}) * 2

    assert set(measured) == {(name, bits) for name in q.layers for bits in candidates}
    assert read_latency(tmp_path / "table.csv") == pytest.approx(dict(measured), abs=1e-6)
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == "layer,bits,milliseconds"
    assert min(measured.values()) > 0
    assert measured.network == pytest.approx(measured.total() + measured.rest)
    for given in (measured, tmp_path / "table.csv"):
        budget = calque.Budget(latency=(given, limit), size=0.9)
        chosen = calque.quantize(networks.trained(), calibration, bits=candidates, budget=budget, recipe="light")
        assert measured.total({name: chosen.plan[name] for name in chosen.layers}) <= limit


def test_equal_work_is_measured_once(short: None, q: QuantizedModel, calibration: Tensor) -> None:
    seen: list[tuple[str, int, int]] = []
    measured = latency_table(
        q, calibration, bits=("w8a8", "w4a8", "w6a6", "w4a4"), progress=lambda *step: seen.append(step)
    )

    assert all(measured[name, "w8a8"] == measured[name, "w4a8"] for name in q.layers)
    assert all(measured[name, "w6a6"] == measured[name, "w4a4"] for name in q.layers)
    # of 20 entries: five layers at 8 and at 4 bits, and conv2's work at 4 bits is conv1's
    assert seen == [("latency", number, 9) for number in range(1, 10)]


def test_layers_that_stay_float_or_look_rows_up_have_the_entries_that_a_run_asks_for(
    short: None, trained: nn.Module, calibration: Tensor
) -> None:
    left = calque.quantize(trained, calibration, recipe="nearest", override={"conv2": None, "conv1": "w4"})

    measured = latency_table(left, calibration, bits=("w4a4",))

    assert measured["conv2", "float"] > 0
    assert measured["conv1", "w4"] > 0
    assert measured["stem", "w8a8"] > 0  # its own bits


def test_tables_and_groups_have_the_bits_that_suit_them() -> None:
    rows = Standing("rows", Geometry("embedding"), (9, 4), (1, 5), Bits(8, None), False, False, True, False)
    dense = Standing("dense", *DENSE, Bits(8, 8), False, False, True, False)

    assert [str(b) for b in table._choices_of(rows, [Bits(4, 4)])] == ["w4", "w8"]
    assert [str(b) for b in table._choices_of(dense, [Bits(4, None, 16), Bits(4, None, 64)])] == ["w4g16", "w4", "w8a8"]


def test_a_second_reader_of_a_value_is_not_charged_for_its_grid() -> None:
    dense = Standing("key", *DENSE, Bits(8, 8), False, False, False, False)

    assert kernels(alone(dense, Bits(4, 4))) == ["QGemm"]


def test_noisy_entries_are_noted() -> None:
    entries = {("a", "w8a8"): 1.0, ("b", "w8a8"): 2.0}
    quiet = LatencyTable(entries, dict.fromkeys(entries, 0.01), {"a": "w8a8", "b": "w8a8"}, 3.5)
    loud = LatencyTable(entries, dict.fromkeys(entries, 0.5), {"a": "w8a8", "b": "w8a8"}, 3.5)

    assert "noisy" not in str(quiet)
    assert "2 entries are noisy" in str(loud)
    assert quiet.rest == 0.5
    assert "w8a8 3" in str(quiet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, "bits are a tuple of choices"),
        ({"bits": ("a8",)}, "bits are a tuple of choices"),
        ({"bits": ("4",)}, "bits are written"),
        ({"threads": 0}, "threads must be an int from 1 to 1,024. Got 0"),
        ({"batch": 0}, "batch must be an int from 1 to 1,000,000. Got 0"),
        ({"batch": 4096}, "batch is at most the rows"),
    ],
)
def test_wrong_arguments_are_refused(
    q: QuantizedModel, calibration: Tensor, options: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        latency_table(q, calibration, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_the_csv_is_plain(tmp_path: Path) -> None:
    LatencyTable({("a", "w8a8"): 0.5}, {("a", "w8a8"): 0.0}, {"a": "w8a8"}, 1.0).save(tmp_path / "t.csv")

    assert (tmp_path / "t.csv").read_text() == "layer,bits,milliseconds\na,w8a8,0.500000\n"
