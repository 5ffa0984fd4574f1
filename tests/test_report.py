import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import calque
import networks
from calque.allocation.costs import FLOAT_BITS, layer_size
from calque.network import Geometry
from calque.quantized.model import QuantizedModel
from calque.report import LayerReport, Report, signal_to_noise, table_lines
from networks import Net

LAYER = LayerReport("conv", "w4a4", -1.0, 2.0, 1e-2, 1e-3, 0.5, 100, 1000, 16000)
FLOAT_LAYER = LayerReport("head", "float", None, None, None, None, 0.0, 40, 10, 10240)
REPORT = Report(
    "nearest", "integer", 3, 128, (LAYER, FLOAT_LAYER), {"add": ("a8", -1.5, 3.0)}, 1000, 60,
    {"capture": 0.25, "fit": 1.5}, ("größe stays float.",), {"torch": "2.9"},
)  # fmt: skip


@pytest.fixture(scope="module")
def quantized(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    return calque.quantize(trained, calibration, bits="w3a4", recipe="nearest", override={"conv2": None})


def test_a_report_comes_back_from_its_json(quantized: QuantizedModel) -> None:
    for report in (REPORT, quantized.report):
        assert Report.from_json(report.to_json()) == report


def test_totals_are_the_sums_of_the_layers_and_what_stays_float() -> None:
    assert REPORT.size == 100 + 40 + 60
    assert REPORT.bit_operations == 26240
    assert REPORT.seconds == 1.75


def test_the_table_shows_every_layer_tensor_note_and_the_totals() -> None:
    text = str(REPORT)

    conv = next(line for line in text.splitlines() if line.startswith("conv"))
    assert conv.split() == [
        "conv",
        "w4a4",
        "-1",
        "..",
        "2",
        "1.00e-02",
        "1.00e-03",
        "20.0",
        "30.0",
        "0.50",
        "100",
        "0.0",
    ]
    assert next(line for line in text.splitlines() if line.startswith("total")).split()[-2] == "200"
    assert "tensor add: a8, -1.5 .. 3" in text
    assert "recipe nearest, placement integer, seed 3, 128 calibration rows" in text
    assert "200 bytes, 20.0% of the float network's 1,000" in text
    assert "note: größe stays float." in text


@given(st.floats(1e-20, 1e5))
def test_decibels_are_ten_times_the_logarithm(error: float) -> None:
    assert signal_to_noise(error) == pytest.approx(-10 * math.log10(error))


def test_an_error_of_nothing_has_finite_decibels() -> None:
    assert math.isfinite(signal_to_noise(0.0))


def test_a_table_aligns_its_columns() -> None:
    lines = table_lines(("name", "n"), [("a", "1"), ("longer", "1000")])

    assert lines == ["name       n", "------  ----", "a          1", "longer  1000"]


@given(st.integers(0, 10**6), st.integers(1, 500), st.integers(2, 8))
def test_the_size_of_a_layer_is_packed_codes_and_twelve_bytes_per_channel(codes: int, channels: int, bits: int) -> None:
    assert layer_size(codes, channels, bits, Geometry("linear")) == math.ceil(codes * bits / 8) + 12 * channels


def test_bytes_and_bit_operations_are_worked_by_hand(quantized: QuantizedModel) -> None:
    """8 x 8 images: stem 1 to 8, conv1, conv2 8 to 8, down 8 to 12 at stride 2, all 3 x 3; head 12 to 4."""
    layers = {layer.name: layer for layer in quantized.report.layers}

    assert {name: layer.macs for name, layer in layers.items()} == {
        "stem": 64 * 72, "conv1": 64 * 576, "conv2": 64 * 576, "down": 16 * 864, "head": 48
    }  # fmt: skip
    assert {name: layer.size for name, layer in layers.items()} == {
        "stem": 72 + 96,
        "conv1": 576 * 3 // 8 + 96,
        "conv2": 4 * (576 + 8),
        "down": 864 * 3 // 8 + 144,
        "head": 48 + 48,
    }
    assert layers["conv1"].bit_operations == 64 * 576 * 3 * 4
    assert layers["conv2"].bit_operations == 64 * 576 * FLOAT_BITS**2
    assert quantized.report.float_size == 4 * (72 + 576 + 576 + 864 + 48 + 8 + 8 + 8 + 12 + 4)
    assert quantized.report.other_size == 0


def test_the_report_says_what_reproduces_the_run(quantized: QuantizedModel) -> None:
    report = quantized.report

    assert (report.recipe, report.placement, report.seed, report.calibration_rows) == (
        "nearest",
        "integer",
        0,
        128,
    )
    assert set(report.versions) >= {"calque", "torch"}
    assert report.versions["torch"] == torch.__version__


def test_ranges_and_tensors_of_the_report_are_those_of_the_network(quantized: QuantizedModel) -> None:
    report, grids = quantized.report, quantized.quantizers

    stem = report.layers[0]
    assert (stem.low, stem.high) == grids["stem.input"].range
    for name, (bits, low, high) in report.tensors.items():
        assert (bits, low, high) == (f"a{grids[name].bits}", *grids[name].range)


def test_parameters_that_stay_float_are_in_the_size() -> None:
    net = Net(lambda net, x: net.norm(F.relu(net.conv(x))), conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4))

    report = calque.quantize(net, networks.images(50, seed=0), bits="w8a8", recipe="nearest").report

    assert report.other_size == 4 * 16
    assert report.float_size == 4 * (36 + 4 + 16)


def test_a_functional_layer_leaves_no_float_weight_behind() -> None:
    net = Net(lambda net, x: F.linear(x.flatten(1), net.weight), weight=torch.zeros(4, 64))

    q = calque.quantize(net, networks.images(50, seed=0), recipe="nearest")

    assert q.report.other_size == 0
    assert not any(name.endswith("weight") for name in q.state_dict())


def test_a_shared_weight_is_counted_once() -> None:
    net = Net(lambda net, x: net.c(F.relu(net.c(x))), c=nn.Conv2d(1, 1, 3, padding=1))

    assert calque.quantize(net, networks.images(50, seed=0), recipe="nearest").report.float_size == 4 * 10


def test_equal_reports_are_equal_and_a_changed_one_is_not() -> None:
    assert replace(REPORT) == REPORT
    assert replace(REPORT, seed=4) != REPORT
