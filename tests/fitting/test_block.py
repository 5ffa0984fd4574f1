import copy
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import calque
import networks
from calque.calibration.execution import Execution
from calque.errors import SpecError
from calque.fitting.block import BlockFit, BlockProblem, fit_block
from calque.network import Network, capture
from calque.network.blocks import find_blocks
from calque.quantized.assembled import link_requantization
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import Quantizer
from calque.run.spill import Store
from calque.settings import Blocks, RelativeRates

# The solver is tested at step sizes of its own, so that tuning the recipes moves no result here.
RATES = RelativeRates(weight=0.03, weight_scale=3e-3, bias=3e-3, activation_scale=3e-3, zero_point=3e-2)


def value_at(module: fx.GraphModule, name: str, x: Tensor) -> Tensor:
    """The value of the node `name` for the flat input x."""
    (argument,) = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    with Store(10**9) as store:
        execution = Execution(module, [{argument: x}], store)
        for node in module.graph.nodes:
            execution.step(node)
            if node.name == name:
                found: Tensor = next(execution.values(node))
                return found
            execution.release(node)
    raise AssertionError(name)


def problem_of(network: Network, model: QuantizedModel, x: Tensor) -> BlockProblem:
    """The network's only block, in its quantized twin."""
    (block,) = find_blocks(network)
    module = model.graph_module
    nodes = {node.name: node for node in module.graph.nodes}
    source, end = nodes[block.input.name], nodes[block.end.name]
    targets = value_at(network.module, block.end.name, x)
    return BlockProblem(module, source, end, value_at(module, source.name, x), targets)


@pytest.fixture(scope="module")
def network(trained: networks.Residual) -> Network:
    return capture(trained, {"image": networks.images(5, seed=0)}, {})


@pytest.fixture(scope="module")
def coarse(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    return calque.quantize(trained, calibration, bits="w3a4", recipe="nearest")


@pytest.fixture(scope="module")
def problem(network: Network, coarse: QuantizedModel, calibration: Tensor) -> BlockProblem:
    return problem_of(network, coarse, calibration)


def fitted(
    problem: BlockProblem,
    *,
    steps: int = 60,
    rows: int = 32,
    rates: RelativeRates = RATES,
    seed: int = 0,
    fixed_codes: Collection[str] = (),
) -> BlockFit:
    generator = torch.Generator().manual_seed(seed)
    return fit_block(problem, Blocks(steps, rates), rows=rows, generator=generator, fixed_codes=fixed_codes)


def tensors(fit: BlockFit) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = {**fit.layers, **fit.quantizers}
    return {f"{target}.{name}": value for target, part in parts.items() for name, value in part.state_dict().items()}


def equal(one: BlockFit, other: BlockFit) -> bool:
    return all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())


def test_a_block_has_the_quantizers_between_its_ends_and_nothing_behind(
    problem: BlockProblem, coarse: QuantizedModel
) -> None:
    layers = [str(node.target) for node in problem.layers()]
    edges = [coarse.edge_name(node) for node in problem.quantizers()]

    assert layers == ["conv1", "conv2"]
    assert edges == ["stem.output", "conv1.input", "conv2.input", "conv2.output"]
    assert problem.nodes[-1] is problem.end


def test_a_block_of_the_quantized_network_computes_what_the_network_computes(
    problem: BlockProblem, calibration: Tensor
) -> None:
    expected = value_at(problem.module, problem.end.name, calibration)

    assert torch.equal(problem.run(problem.inputs, {}), expected)


def test_a_fitted_block_is_much_closer_to_the_float_one_on_inputs_that_it_never_saw(
    problem: BlockProblem, network: Network, coarse: QuantizedModel, test_inputs: Tensor
) -> None:
    fit = fitted(problem, steps=100)

    unseen = problem_of(network, coarse, test_inputs)
    everything = torch.arange(len(test_inputs))
    before = unseen.error({}, everything, 100)
    after = unseen.error({**fit.layers, **fit.quantizers}, everything, 100)
    assert fit.after < 0.7 * fit.before
    assert after < 0.7 * before


def test_a_fit_put_into_the_network_computes_there_what_it_was_judged_by(
    problem: BlockProblem, coarse: QuantizedModel, calibration: Tensor
) -> None:
    fit = fitted(problem)
    model = copy.deepcopy(coarse)
    for name, part in {**fit.layers, **fit.quantizers}.items():
        model.graph_module.set_submodule(name, part)
    link_requantization(model.graph_module)

    output = value_at(model.graph_module, problem.end.name, calibration)

    held_out = len(calibration) // 5
    target: Tensor = problem.targets[-held_out:]
    power = (target - target.mean((0, 2, 3), keepdim=True)).square().mean()
    error = (output[-held_out:] - target).square().mean() / power
    assert error.item() == pytest.approx(fit.after, rel=1e-3)
    torch.testing.assert_close(model(calibration), model.integer()(calibration), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_a_block_is_never_worse_than_it_was_on_held_out_inputs(problem: BlockProblem, factor: float) -> None:
    rates = replace(RATES, weight=factor * RATES.weight, bias=factor * RATES.bias)

    fit = fitted(problem, rates=rates)

    held_out = torch.arange(len(problem.inputs))[-(len(problem.inputs) // 5) :]
    alone = {str(node.target): layer.alone() for node, layer in problem.layers().items()}
    assert fit.before == problem.error(alone, held_out, 32)
    assert fit.after == problem.error({**fit.layers, **fit.quantizers}, held_out, 32)
    assert fit.after <= fit.before


def test_a_block_that_gains_nothing_is_left_as_it_is(problem: BlockProblem) -> None:
    fit = fitted(problem, steps=1, rates=RelativeRates(1e6, 1e6, 1e6, 1e6, 1e6))

    assert fit.after == fit.before
    for name, value in tensors(fit).items():
        assert torch.equal(value, problem.module.state_dict()[name])


def test_only_grids_that_one_layer_of_the_block_alone_reads_move(problem: BlockProblem, coarse: QuantizedModel) -> None:
    fit = fitted(problem)

    edges = {coarse.facts.edges[target] for target in fit.quantizers}
    assert edges == {"conv1.input", "conv2.input"}  # stem.output feeds the shortcut too, conv2.output the add
    for target, quantizer in fit.quantizers.items():
        before = problem.module.get_submodule(target)
        assert isinstance(before, Quantizer)
        assert not torch.equal(quantizer.scale, before.scale)


def test_a_grid_that_two_layers_read_does_not_move() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        y: Tensor = F.relu(net.left(x)) + F.relu(net.right(x))
        return y

    parts = {name: nn.Conv2d(1 if name == "stem" else 4, 4, 3, padding=1) for name in ("stem", "left", "right")}
    net, x = networks.Net(forward, **parts).eval(), networks.images(40, seed=0)
    model = calque.quantize(net, x, bits="w3a4", recipe="nearest", first_last=None)

    fit = fitted(problem_of(capture(net, {"x": x[:5]}, {}), model, x))

    assert set(fit.layers) == {"left", "right"}
    assert fit.quantizers == {}
    assert fit.after < fit.before


def test_biases_lie_on_the_accumulators_grid_of_the_moved_input_scale(
    problem: BlockProblem, coarse: QuantizedModel
) -> None:
    fit = fitted(problem)

    scales = {coarse.facts.edges[target]: quantizer.scale for target, quantizer in fit.quantizers.items()}
    for name, layer in fit.layers.items():
        assert layer.bias.dtype == torch.int32
        assert layer.bias_scale is not None
        assert torch.equal(layer.bias_scale, scales[f"{name}.input"] * layer.scale)


def test_codes_move_by_descent_unless_another_layer_has_them_too(problem: BlockProblem) -> None:
    before = {str(node.target): layer.codes for node, layer in problem.layers().items()}

    free, tied = fitted(problem, steps=100), fitted(problem, steps=100, fixed_codes=["conv1", "conv2"])

    assert not all(torch.equal(layer.codes, before[name]) for name, layer in free.layers.items())
    assert all(torch.equal(layer.codes, before[name]) for name, layer in tied.layers.items())
    assert free.after < tied.after < tied.before


def test_the_same_seed_gives_the_same_fit_and_another_one_another(problem: BlockProblem) -> None:
    assert equal(fitted(problem), fitted(problem))
    assert not equal(fitted(problem), fitted(problem, seed=1))


def test_the_callers_gradient_mode_does_not_matter(problem: BlockProblem) -> None:
    with torch.no_grad():
        under_no_grad = fitted(problem)
        assert not torch.is_grad_enabled()

    assert equal(under_no_grad, fitted(problem))
    assert not any(tensor.requires_grad for tensor in tensors(under_no_grad).values())


@pytest.mark.parametrize("rate", ["weight", "weight_scale", "bias", "activation_scale"])
def test_each_rate_changes_the_fit(problem: BlockProblem, rate: str) -> None:
    changed = replace(RATES, **{rate: 2 * getattr(RATES, rate)})

    assert not equal(fitted(problem), fitted(problem, rates=changed))


def test_the_number_of_rows_changes_the_fit(problem: BlockProblem) -> None:
    assert not equal(fitted(problem), fitted(problem, rows=31))


def test_the_modules_of_the_network_are_not_changed(problem: BlockProblem) -> None:
    before = copy.deepcopy(problem.module.state_dict())

    fitted(problem)

    assert all(torch.equal(value, problem.module.state_dict()[name]) for name, value in before.items())


def test_a_block_without_inputs_or_with_other_targets_is_refused(problem: BlockProblem) -> None:
    with pytest.raises(SpecError, match=r"as many targets as inputs, at least one\. Got 0 inputs and 0 targets"):
        replace_rows(problem, 0, 0)
    with pytest.raises(SpecError, match="Got 3 inputs and 4 targets"):
        replace_rows(problem, 3, 4)


def replace_rows(problem: BlockProblem, inputs: int, targets: int) -> BlockProblem:
    return BlockProblem(problem.module, problem.source, problem.end, problem.inputs[:inputs], problem.targets[:targets])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_inputs_are_enough(problem: BlockProblem, count: int) -> None:
    fit = fitted(replace_rows(problem, count, count), steps=10)

    assert fit.after <= fit.before


def test_sizes_taken_of_the_networks_input_are_those_of_the_rows_at_hand() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        rows = x.size(0)
        x = F.relu(net.stem(x))
        y = F.relu(net.first(x)).view(rows, 2, 2, 8, 8).transpose(1, 2).reshape(rows, 4, 8, 8)
        z: Tensor = net.second(y) + x
        return z

    parts = {name: nn.Conv2d(1 if name == "stem" else 4, 4, 3, padding=1) for name in ("stem", "first", "second")}
    net, x = networks.Net(forward, **parts).eval(), networks.images(40, seed=0)
    model = calque.quantize(net, x, bits="w3a4", recipe="nearest", first_last=None)

    fit = fitted(problem_of(capture(net, {"x": x[:5]}, {}), model, x))

    assert fit.after < fit.before
