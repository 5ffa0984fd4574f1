import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import calque
import networks
from calque.calibration.channel_statistics import ChannelStatistics
from calque.calibration.execution import Execution
from calque.correction.normalization import GAIN_LIMITS, absorb, correction, para_normalize
from calque.network import Batch, Geometry, Network, WeightedLayer, capture
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer
from calque.run.spill import Store

CONVOLUTION, LINEAR = Geometry("convolution"), Geometry("linear")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(-1e3, 1e3), st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=30)
def test_channel_statistics_equal_numpy_however_the_inputs_are_split(
    sizes: list[int], mean: float, width: float
) -> None:
    outputs = torch.randn(sum(sizes), 3, 4, 5, generator=torch.Generator().manual_seed(0)) * width + mean

    statistics = ChannelStatistics.of(networks.pieces(outputs, sizes), CONVOLUTION)

    expected = outputs.numpy().astype(np.float64)
    np.testing.assert_allclose(statistics.mean.numpy(), expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-4 * width)
    error = 1e-4 * width**2 + 1e-6 * abs(mean) * width  # float32 values and means
    np.testing.assert_allclose(statistics.variance.numpy(), expected.var((0, 2, 3)), rtol=1e-4, atol=error)


@pytest.mark.parametrize("shape", [(6, 3), (6, 5, 3), (6, 2, 5, 3)])
def test_channels_of_a_linear_layer_are_on_its_last_axis(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    statistics = ChannelStatistics.of(networks.pieces(outputs, 4), LINEAR)

    rows = outputs.numpy().astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(statistics.mean.numpy(), rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics.variance.numpy(), rows.var(0), rtol=1e-5)


def statistics(mean: float, variance: float) -> ChannelStatistics:
    return ChannelStatistics(torch.tensor([mean]).double(), torch.tensor([variance]).double())


@pytest.mark.parametrize(
    ("now", "target", "gain", "offset"),
    [
        ((1.0, 4.0), (3.0, 9.0), 1.5, 1.5),  # 3 - 1.5 * 1
        ((1.0, 4.0), (1.0, 4.0), 1.0, 0.0),
        ((2.0, 1e-12), (3.0, 1.0), GAIN_LIMITS[1], 3.0 - 2.0 * GAIN_LIMITS[1]),
        ((2.0, 0.0), (3.0, 1.0), GAIN_LIMITS[1], 3.0 - 2.0 * GAIN_LIMITS[1]),
        ((2.0, 100.0), (3.0, 1.0), GAIN_LIMITS[0], 3.0 - 2.0 * GAIN_LIMITS[0]),
        ((2.0, 1.0), (3.0, 0.0), 1.0, 1.0),
        ((2.0, 0.0), (3.0, 0.0), 1.0, 1.0),
    ],
)
def test_a_correction_is_worked_by_hand_and_its_gain_bounded(
    now: tuple[float, float], target: tuple[float, float], gain: float, offset: float
) -> None:
    received = correction(statistics(*now), statistics(*target))

    assert received[0].item() == pytest.approx(gain)
    assert received[1].item() == pytest.approx(offset)


def test_a_strength_of_one_half_takes_the_square_root_of_the_gain() -> None:
    gain, offset = correction(statistics(1.0, 4.0), statistics(3.0, 9.0), 0.5)

    assert gain.item() == pytest.approx(1.5**0.5)
    assert offset.item() == pytest.approx(3.0 - 1.5**0.5)  # the mean goes all the way


def quantized_layer(bias_scale: Tensor | None) -> QuantizedLayer:
    codes = torch.tensor([[1, -2, 3], [-8, 7, 0]], dtype=torch.int8)
    bias = torch.tensor([400, -100], dtype=torch.int32) if bias_scale is not None else torch.tensor([0.3, -0.1])
    return QuantizedLayer(LINEAR, codes, torch.tensor([0.5, 0.25]), bias, bias_scale, bits=4)


@pytest.mark.parametrize("bias_scale", [torch.tensor([0.005, 0.0025]), None], ids=["on a grid", "float input"])
def test_absorbing_scales_the_output_and_leaves_the_codes(bias_scale: Tensor | None) -> None:
    layer = quantized_layer(bias_scale)
    gain, offset = torch.tensor([1.7, 0.6]).double(), torch.tensor([-2.0, 0.3]).double()
    x = 0.01 * torch.tensor([[100.0, 50.0, -30.0], [0.0, 1.0, 2.0]])

    absorbed = absorb(layer, gain, offset)

    assert isinstance(absorbed, QuantizedLayer)
    assert torch.equal(absorbed.codes, layer.codes)
    expected = layer(x) * gain + offset
    torch.testing.assert_close(absorbed(x).double(), expected, rtol=1e-5, atol=0.01)  # the step of the bias


def test_absorbing_into_a_float_layer_is_exact() -> None:
    layer = WeightedLayer(LINEAR, torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]))

    absorbed = absorb(layer, torch.tensor([2.0]).double(), torch.tensor([-1.0]).double())

    assert absorbed.weight.tolist() == [[2.0, 4.0]]
    assert absorbed.bias.tolist() == [5.0]


@pytest.fixture(scope="module")
def network(trained: networks.Residual, calibration: Tensor) -> Network:
    return capture(trained, {"image": calibration[:4]})


def measured(module: fx.GraphModule, batches: list[Batch], names: list[str]) -> dict[str, ChannelStatistics]:
    found = {}
    with Store(10**9) as store:
        execution = Execution(module, batches, store)
        for node in module.graph.nodes:
            if str(node.target) in names:
                layer = module.get_submodule(str(node.target))
                assert isinstance(layer, (QuantizedLayer, WeightedLayer))
                raw = layer.alone() if isinstance(layer, QuantizedLayer) else layer
                found[str(node.target)] = ChannelStatistics.of(execution.compute(node, raw), layer.geometry)
            execution.step(node)
            execution.release(node)
    return found


def normalized(
    module: fx.GraphModule,
    targets: dict[str, ChannelStatistics],
    batches: list[Batch],
    *callbacks: Callable[[str], None],
) -> fx.GraphModule:
    module = copy.deepcopy(module)
    with Store(10**9) as store:
        para_normalize(module, targets, batches, store, *callbacks)
    return module


def test_the_float_network_is_a_fixed_point(network: Network, calibration: Tensor, test_inputs: Tensor) -> None:
    batches: list[Batch] = [{"image": part} for part in networks.pieces(calibration, 50)]
    visited: list[str] = []

    corrected = normalized(
        network.module, measured(network.module, batches, list(network.layers)), batches, visited.append
    )

    before, after = network.module(test_inputs)[0], corrected(test_inputs)[0]
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert visited == list(network.layers)


def test_a_planted_shift_of_mean_and_variance_is_removed(
    network: Network, calibration: Tensor, test_inputs: Tensor
) -> None:
    batches: list[Batch] = [{"image": part} for part in networks.pieces(calibration, 50)]
    targets = measured(network.module, batches, list(network.layers))
    shifted = copy.deepcopy(network.module)
    for name, layer in network.layers.items():
        weighted = network.weighted(layer.name)
        gain = torch.linspace(0.7, 1.6, len(weighted.bias)).double()
        shifted.set_submodule(name, absorb(weighted, gain, 0.3 * gain))

    corrected = normalized(shifted, targets, batches)

    before = network.module(test_inputs)[0]
    assert (shifted(test_inputs)[0] - before).abs().max() > 0.1 * before.abs().max()
    assert (corrected(test_inputs)[0] - before).abs().max() < 1e-3 * before.abs().max()


def test_a_quantized_network_gets_the_float_statistics_and_keeps_its_codes(
    network: Network, trained: networks.Residual, calibration: Tensor
) -> None:
    batches: list[Batch] = [{"image": calibration}]
    q: QuantizedModel = calque.quantize(trained, calibration, bits="w3a3", recipe="nearest")
    targets = measured(network.module, batches, list(network.layers))
    names = list(network.layers)

    corrected = normalized(q.graph_module, targets, batches)

    now, before = measured(corrected, batches, names), measured(q.graph_module, batches, names)
    for name, layer in q.layers.items():
        twin = corrected.get_submodule(name)
        assert isinstance(twin, QuantizedLayer)
        assert torch.equal(twin.codes, layer.codes)
        assert twin.bias_scale is not None
        apart = (now[name].mean - targets[name].mean).abs()  # the bias is a whole number of accumulator units
        assert (apart <= 0.5 * twin.bias_scale + 1e-4 * targets[name].variance.sqrt()).all()
        if layer.bits < 8:
            assert not torch.allclose(before[name].variance, targets[name].variance, rtol=0.02, atol=0.0)
        torch.testing.assert_close(now[name].variance, targets[name].variance, rtol=0.02, atol=0.0)


def test_a_ruined_channel_is_not_amplified_past_the_limit(network: Network, calibration: Tensor) -> None:
    batches: list[Batch] = [{"image": calibration}]
    targets = measured(network.module, batches, ["stem"])
    ruined = copy.deepcopy(network.module)
    faint = absorb(network.weighted("stem"), torch.full((8,), 1e-3).double(), torch.zeros(8).double())
    ruined.set_submodule("stem", faint)

    corrected = normalized(ruined, targets, batches)

    twin = corrected.get_submodule("stem")
    assert isinstance(twin, WeightedLayer)
    torch.testing.assert_close(twin.weight, faint.weight * GAIN_LIMITS[1])


def test_a_layer_without_a_target_is_left_alone(network: Network, calibration: Tensor) -> None:
    batches: list[Batch] = [{"image": calibration}]
    shifted = {"conv2": ChannelStatistics(torch.ones(8).double(), torch.ones(8).double())}

    corrected = normalized(network.module, shifted, batches)

    for name in network.layers:
        twin = corrected.get_submodule(name)
        assert isinstance(twin, WeightedLayer)
        assert torch.equal(twin.weight, network.weighted(name).weight) == (name != "conv2")


def test_a_bias_at_the_end_of_int32_keeps_its_value_whatever_the_gain() -> None:
    codes, scale = torch.ones(1, 2, dtype=torch.int8), torch.tensor([1e-9])
    layer = QuantizedLayer(LINEAR, codes, scale, torch.tensor([2**30], dtype=torch.int32), 0.1 * scale, bits=8)
    halved = torch.tensor([0.5]).double(), 0.5 * layer.real_bias.double()  # b / 2 + b / 2

    corrected = absorb(layer, *halved)

    assert isinstance(corrected, QuantizedLayer)
    torch.testing.assert_close(corrected.real_bias, layer.real_bias, rtol=1e-5, atol=0.0)


def test_channel_statistics_of_tiny_outputs_do_not_vanish() -> None:
    outputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))

    tiny, plain = (ChannelStatistics.of([outputs * unit], LINEAR) for unit in (2.0**-80, 1.0))

    assert torch.equal(tiny.variance, plain.variance * 2.0**-160)
