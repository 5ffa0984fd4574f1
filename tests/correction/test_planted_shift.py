"""Para-normalization judged on inputs that it did not see: benchmarks/statistics.py in small."""

import copy

import pytest
import torch
from torch import Tensor, fx

import networks
from calque.calibration.channel_statistics import ChannelStatistics, trained_statistics
from calque.calibration.execution import Execution
from calque.correction.normalization import absorb, para_normalize
from calque.network import Batch, Network, WeightedLayer, capture
from calque.run.spill import Store

Statistics = dict[str, ChannelStatistics]
GAIN = (0.6, 1.6)  # its inverse is within GAIN_LIMITS


@pytest.fixture(scope="module")
def network(trained: networks.Residual, calibration: Tensor) -> Network:
    return capture(trained, {"image": calibration[:4]})


def measured(module: fx.GraphModule, batches: list[Batch], names: list[str]) -> Statistics:
    found = {}
    with Store(10**9) as store:
        execution = Execution(module, batches, store)
        for node in module.graph.nodes:
            execution.step(node)
            if str(node.target) in names:
                layer = module.get_submodule(str(node.target))
                assert isinstance(layer, WeightedLayer)
                found[str(node.target)] = ChannelStatistics.of(execution.values(node), layer.geometry)
            execution.release(node)
    return found


def planted(network: Network, statistics: Statistics, seed: int) -> fx.GraphModule:
    """Each channel's deviation times a random gain, its mean moved by up to one standard deviation."""
    module, generator = copy.deepcopy(network.module), torch.Generator().manual_seed(seed)
    for name, now in statistics.items():
        gain, offset = torch.rand(2, len(now.mean), dtype=torch.float64, generator=generator)
        gain = GAIN[0] + (GAIN[1] - GAIN[0]) * gain
        offset = (2 * offset - 1) * now.variance.sqrt() + (1 - gain) * now.mean
        module.set_submodule(name, absorb(network.weighted(name), gain, offset))
    return module


def apart(now: Statistics, then: Statistics, scale: Statistics, names: list[str]) -> tuple[float, float]:
    """Root mean squares over channels: of the means' difference in deviations, and of the variances' log ratio."""
    means = torch.cat([(now[n].mean - then[n].mean) / scale[n].variance.sqrt() for n in names])
    ratios = torch.cat([(now[n].variance / then[n].variance).log() for n in names])
    return means.square().mean().sqrt().item(), ratios.square().mean().sqrt().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("target", ["float", "trained"])
def test_what_is_left_of_a_planted_shift_on_other_inputs_is_what_resampling_leaves(
    network: Network, target: str, seed: int
) -> None:
    first: list[Batch] = [{"image": part} for part in networks.pieces(networks.stripes(512, seed=5)[0], 100)]
    second: list[Batch] = [{"image": networks.stripes(512, seed=6)[0]}]
    on_first, on_second = (measured(network.module, part, list(network.layers)) for part in (first, second))
    goal = on_first if target == "float" else trained_statistics(network)
    names = list(goal)
    shifted = planted(network, {name: on_first[name] for name in names}, seed)

    restored = copy.deepcopy(shifted)
    with Store(10**9) as store:
        para_normalize(restored, goal, first, store)

    resampled = apart(on_second, on_first, on_first, names)
    before = apart(measured(shifted, second, names), goal, on_first, names)
    left = apart(measured(restored, second, names), goal, on_first, names)
    for was, remains, alone in zip(before, left, resampled, strict=True):
        assert was > 20 * alone
        assert remains < 1.1 * alone  # measured: 0.98 to 1.00


def test_the_float_target_gives_the_float_network_back_and_the_trained_one_moves_it(
    network: Network, calibration: Tensor, test_inputs: Tensor
) -> None:
    batches: list[Batch] = [{"image": calibration}]
    on_first = measured(network.module, batches, list(network.layers))
    reference, errors = network.module(test_inputs)[0], {}
    for target, goal in {"float": on_first, "trained": trained_statistics(network)}.items():
        module = planted(network, {name: on_first[name] for name in goal}, seed=0)
        with Store(10**9) as store:
            para_normalize(module, goal, batches, store)
        errors[target] = ((module(test_inputs)[0] - reference).square().mean() / reference.var()).item()

    assert errors["float"] < 1e-8  # float32's rounding
    assert 1e-4 < errors["trained"] < 0.1  # calibration inputs do not have the trained statistics
