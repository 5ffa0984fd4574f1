"""Channel scales that move over activations: where, how much, that nothing changes in real numbers, and what it gains."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.fitting.channel_scales.migration import LARGEST, Migration
from calque.fitting.problem import LayerProblem
from calque.grid.bits import FLOAT, Bits
from calque.network import Network
from calque.network.capture import capture
from calque.quantized.placement import place
from calque.recipe import FAST, Sequential

W4A4 = Bits(4, 4)


def captured(model: nn.Module, example: Tensor) -> Network:
    return capture(model, {next(iter(inspect.signature(model.forward).parameters)): example})


def over(network: Network, exponent: float = 0.5, floating: str = "") -> Migration:
    bits = {name: FLOAT if name == floating else W4A4 for name in network.layers}
    return Migration.over(network, bits, place(network, bits, "integer"), exponent)


def chain(clip: Callable[[Tensor], Tensor], second: nn.Module, third: nn.Module | None = None) -> networks.Net:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        y = clip(net.first(x))
        return net.second(y) if third is None else net.second(y) + net.third(y)  # type: ignore[no-any-return]

    parts = {"first": nn.Conv2d(1, 8, 3), "second": second} | ({} if third is None else {"third": third})
    return networks.Net(forward, **parts)


def problem_of(network: Network, name: str, inputs: Tensor) -> LayerProblem:
    """The layer on all positions of the inputs, which must be the network's."""
    layer = network.weighted(name)
    outputs = layer(inputs).detach()
    grouped = layer.geometry.grouped(layer.weight)
    rows = layer.geometry.channels_last(outputs).reshape(-1, layer.geometry.groups, grouped.shape[1]).transpose(0, 1)
    patches = torch.zeros(rows.shape[0], rows.shape[1], grouped.shape[2])
    index = torch.arange(rows.shape[1])
    bias = layer.bias.reshape(rows.shape[0], 1, -1)
    return LayerProblem(patches, rows, grouped, bias, index, index, network.layers[name].activate)


def test_residual_networks_have_the_edge_inside_the_block_only(trained: networks.Residual, calibration: Tensor) -> None:
    migration = over(captured(trained, calibration[:3]))

    assert migration.readers == {"conv1": ("conv2",)}


def test_without_an_exponent_nothing_moves(trained: networks.Residual, calibration: Tensor) -> None:
    assert over(captured(trained, calibration[:3]), 0.0).readers == {}


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_a_float_layer_on_either_side_keeps_the_scales(
    trained: networks.Residual, calibration: Tensor, name: str
) -> None:
    assert over(captured(trained, calibration[:3]), floating=name).readers == {}


def test_an_activation_that_is_no_clip_at_zero_keeps_the_scales() -> None:
    for clip in (F.silu, F.hardtanh, F.leaky_relu):
        assert over(captured(chain(clip, nn.Conv2d(8, 4, 3)), networks.images(2, seed=0))).readers == {}


@pytest.mark.parametrize(
    "second",
    [nn.Conv2d(8, 4, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, groups=2)],
    ids=["dense", "depthwise", "grouped"],
)
def test_scaled_layers_compute_what_the_float_ones_do(second: nn.Module) -> None:
    images = networks.images(20, seed=0)
    network = captured(chain(F.relu, second), images)
    migration = over(network, 0.7)

    migration.chosen(network.layers["first"], problem_of(network, "first", images))

    scaled = migration.weighted("second")(F.relu(migration.weighted("first")(images)))
    expected = network.weighted("second")(F.relu(network.weighted("first")(images)))
    assert migration.scales["first"].max() > 1.1
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)


def test_several_readers_are_all_divided() -> None:
    images = networks.images(20, seed=0)
    network = captured(chain(F.relu, nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)), images)
    migration = over(network)

    migration.chosen(network.layers["first"], problem_of(network, "first", images))

    scales = migration.scales["first"].reshape(1, -1, 1, 1)
    for name in ("second", "third"):
        torch.testing.assert_close(migration.weighted(name).weight * scales, network.weighted(name).weight)


@pytest.mark.parametrize(("groups", "power"), [(8, 1.0), (1, 0.5)])
def test_channels_grow_by_the_exponent_and_fully_for_depthwise_readers(groups: int, power: float) -> None:
    images = networks.images(40, seed=0)
    network = captured(chain(F.relu, nn.Conv2d(8, 8, 3, groups=groups)), images)
    migration, problem = over(network), problem_of(network, "first", images)

    scaled = migration.chosen(network.layers["first"], problem)

    sizes = F.relu(problem.targets[0]).quantile(0.9995, dim=0, interpolation="higher")
    torch.testing.assert_close(migration.scales["first"], (sizes.max() / sizes) ** power, rtol=0.05, atol=0.0)
    assert migration.scales["first"].min() == 1.0
    factor = migration.scales["first"][None, None]
    torch.testing.assert_close(scaled.targets, problem.targets * factor)
    torch.testing.assert_close(scaled.weight, problem.weight * factor.mT)
    torch.testing.assert_close(scaled.bias, problem.bias * factor)


def test_a_dead_channel_stays_and_a_weak_one_grows_to_the_limit() -> None:
    images = networks.images(40, seed=0)
    net = chain(F.relu, nn.Conv2d(8, 8, 3, groups=8))
    with torch.no_grad():
        net.first.weight[0] = 0.0
        net.first.bias[0] = -1.0
        net.first.weight[1] *= 1e-6
        net.first.bias[1] = 1e-6
    network = captured(net, images)
    migration = over(network)

    migration.chosen(network.layers["first"], problem_of(network, "first", images))

    assert migration.scales["first"][:2].tolist() == [1.0, LARGEST]


def test_scaled_inputs_end_at_the_bound_of_the_clip() -> None:
    images = networks.images(40, seed=0) * 20
    network = captured(chain(F.relu6, nn.Conv2d(8, 8, 3, groups=8)), images)
    migration = over(network)
    migration.chosen(network.layers["first"], problem_of(network, "first", images))
    migration.scales["first"].mul_(3)

    inputs = next(migration.inputs("second", iter([F.relu6(network.weighted("first")(images))])))

    assert inputs.max() == 6.0


def unequal() -> nn.Module:
    """The trained network with channels of very different sizes inside its block, which changes nothing in float."""
    net = networks.trained()
    sizes = torch.logspace(0, -1.5, 8)
    with torch.no_grad():
        net.norm1.weight.mul_(sizes)
        net.norm1.bias.mul_(sizes)
        net.conv2.weight.div_(sizes[:, None, None])
    return net


def test_channels_of_unequal_sizes_are_quantized_better(calibration: Tensor, test_inputs: Tensor) -> None:
    net, error = unequal(), {}
    with torch.no_grad():
        expected = net(test_inputs)
        for exponent in (0.0, 0.5):
            recipe = replace(FAST, flavour=Sequential(exponent))
            q = calque.quantize(net, calibration, bits="w4a4", recipe=recipe)
            error[exponent] = (q(test_inputs) - expected).square().mean().item()

    assert error[0.5] < 0.7 * error[0.0]


def test_the_integer_evaluation_and_the_file_have_the_scaled_network(
    calibration: Tensor, test_inputs: Tensor, tmp_path: Path
) -> None:
    q = calque.quantize(unequal(), calibration, bits="w4a4", recipe=replace(FAST, flavour=Sequential(0.5)))

    path = calque.export_onnx(q, tmp_path / "model.onnx")
    verified = calque.verify(path, q, test_inputs)
    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", networks.Residual().eval())

    assert verified is not None
    assert torch.equal(loaded(test_inputs), q(test_inputs))
    torch.testing.assert_close(q.integer()(test_inputs), q(test_inputs), rtol=0.0, atol=0.05)


def test_behind_a_relu6_the_grid_ends_at_its_bound_and_the_weakest_channel_survives() -> None:
    images, inputs = networks.images(64, seed=0) * 4, networks.images(64, seed=1) * 4
    net = chain(F.relu6, nn.Conv2d(8, 8, 3, groups=8))
    with torch.no_grad():
        net.first.weight.mul_(torch.logspace(1, -1, 8)[:, None, None, None])
        expected = net(inputs)
    error = {}
    for exponent in (0.0, 0.5):
        recipe = replace(FAST, flavour=Sequential(exponent))
        q = calque.quantize(net, images, bits="w4a4", first_last=None, recipe=recipe)
        error[exponent] = (q(inputs) - expected).square().mean((0, 2, 3))
        assert q.quantizers["second.input"].range[1] <= 6.0 * (1 + 1e-6)
        torch.testing.assert_close(q.integer()(inputs), q(inputs), rtol=0.0, atol=0.1)

    assert error[0.5][-1] < 0.3 * error[0.0][-1]  # the weakest channel


def test_a_resumed_run_has_the_same_scales(calibration: Tensor, test_inputs: Tensor, tmp_path: Path) -> None:
    recipe = replace(FAST, flavour=Sequential(0.5))
    first = calque.quantize(unequal(), calibration, bits="w4a4", recipe=recipe, run=tmp_path / "run")

    again = calque.quantize(unequal(), calibration, bits="w4a4", recipe=recipe, run=tmp_path / "run")

    assert torch.equal(first(test_inputs), again(test_inputs))
