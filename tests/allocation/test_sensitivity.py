"""Prices against a network that has one layer swapped and is run as a whole."""

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.allocation.sensitivity import PRICED_ROWS, measure_prices, thin
from calque.calibration.losses import Loss, mse
from calque.network import Batch, Network, capture
from calque.network.signature import flatten, rows
from calque.quantized.model import QuantizedModel
from calque.run.checkpoint import Checkpoint
from networks import Net

INPUTS = networks.images(24, seed=0)
NOWHERE = Checkpoint(None)


def residual(net: Net, x: Tensor) -> Tensor:
    """Two residual blocks, the second with a convolution on its shortcut."""
    x = F.relu(net.stem(x))
    x = F.relu(net.two(F.relu(net.one(x))) + x)
    x = F.relu(net.four(F.relu(net.three(x))) + net.shortcut(x))
    y: Tensor = net.head(x.mean((2, 3)))
    return y


def branches(net: Net, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A concatenation, two outputs, functional operators and one that draws on an early value late."""
    x = F.relu(net.stem(x))
    joined = torch.cat([F.gelu(net.one(x)), torch.sigmoid(net.two(x)) * x], 1)
    wide = F.max_pool2d(joined, 2)
    late = net.three(wide) + F.avg_pool2d(x, 2)
    return net.head(late.flatten(1)), {"map": F.softmax(late, 1)}


def twice(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    x = net.one(F.relu(net.one(x)) * 0.5 + x)
    y: Tensor = net.head(x.permute(0, 2, 3, 1)).mean((1, 2))
    return y


def convolution(inputs: int = 4, outputs: int = 4, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Net(
        residual, stem=convolution(1), one=convolution(), two=convolution(), three=convolution(4, 6, stride=2),
        four=convolution(6, 6), shortcut=convolution(4, 6, 1, stride=2), head=nn.Linear(6, 3),
    ),
    "branches": lambda: Net(
        branches, stem=convolution(1), one=convolution(size=1), two=convolution(), three=convolution(8),
        head=nn.Linear(64, 3),
    ),
    "twice": lambda: Net(twice, stem=convolution(1), one=convolution(), head=nn.Linear(4, 3)),
}  # fmt: skip


class Blurred(nn.Module):
    """A stand-in for a layer: the layer with its result off by a share of it."""

    def __init__(self, layer: nn.Module, share: float):
        super().__init__()
        self.layer, self.share = layer, share
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x)
        return y + self.share * y.sin()


@functools.cache
def quantized(name: str) -> tuple[Network, QuantizedModel]:
    model = NETS[name]()
    q = calque.quantize(model, INPUTS, bits="w8a8", recipe="nearest")
    return capture(model, {"x": INPUTS[:4]}, {}), q


def prepared(name: str) -> tuple[Network, QuantizedModel, dict[str, list[nn.Module]]]:
    """The float network, the one at the base precision, and three stand-ins for each layer."""
    network, base = quantized(name)
    q = copy.deepcopy(base)
    stand_ins: dict[str, list[nn.Module]] = {
        layer: [Blurred(q.layers[layer].alone(), share) for share in (0.05, 0.5, -0.3)] for layer in q.layers
    }
    return network, q, stand_ins


def batches_of(sizes: list[int]) -> list[Batch]:
    return [{"x": part} for part in networks.pieces(INPUTS, sizes)]


def prices(
    network: Network,
    q: QuantizedModel,
    stand_ins: Mapping[str, list[nn.Module]],
    *,
    sizes: list[int] | None = None,
    loss: Loss = mse,
    checkpoint: Checkpoint = NOWHERE,
    on_layer: Callable[[str], None] = lambda name: None,
) -> tuple[float, dict[str, list[float]]]:
    return measure_prices(
        network.module,
        q.graph_module,
        stand_ins,
        batches_of(sizes or [24]),
        loss,
        checkpoint=checkpoint,
        on_layer=on_layer,
    )


def whole_loss(network: Network, q: QuantizedModel, name: str = "", stand_in: nn.Module | None = None) -> float:
    """The loss of a deep copy of the base network with one layer swapped, all of it executed."""
    module = copy.deepcopy(q.graph_module)
    if stand_in is not None:
        module.set_submodule(name, copy.deepcopy(stand_in))
    with torch.no_grad():
        return mse(network.module(INPUTS), module(INPUTS)).item()


@pytest.mark.parametrize("name", NETS)
def test_prices_equal_those_of_whole_networks_with_one_layer_swapped(name: str) -> None:
    network, q, stand_ins = prepared(name)

    base, rises = prices(network, q, stand_ins)

    expected = whole_loss(network, q)
    assert base == pytest.approx(expected, rel=1e-6)
    assert rises.keys() == q.layers.keys()
    for layer, modules in stand_ins.items():
        for received, module in zip(rises[layer], modules, strict=True):
            assert received == pytest.approx(whole_loss(network, q, layer, module) - expected, rel=1e-5, abs=1e-9)
            assert received != 0.0, layer


def test_measuring_leaves_the_base_network_as_it_was() -> None:
    network, q, stand_ins = prepared("residual")
    with torch.no_grad():
        before = q(INPUTS)

    prices(network, q, stand_ins)

    with torch.no_grad():
        assert torch.equal(q(INPUTS), before)


@pytest.mark.parametrize("sizes", [[12, 12], [1, 5, 18], [24]])
@pytest.mark.parametrize("name", NETS)
def test_prices_do_not_depend_on_how_the_inputs_are_split(name: str, sizes: list[int]) -> None:
    network, q, stand_ins = prepared(name)

    def error(reference: object, output: object) -> Tensor:  # a mean over rows, whose power is not the batch's own
        assert isinstance(reference, (list, tuple))
        assert isinstance(output, (list, tuple))
        each = [(a - b).square().mean() for a, b in zip(reference, output, strict=True)]
        return torch.stack(each).sum()

    base, rises = prices(network, q, stand_ins, sizes=sizes, loss=error)

    expected_base, expected = prices(network, q, stand_ins, loss=error)
    assert base == pytest.approx(expected_base, rel=1e-5)
    for layer, values in expected.items():
        assert rises[layer] == pytest.approx(values, rel=1e-4, abs=1e-5 * base)


@pytest.mark.parametrize("name", NETS)
def counting(call: Callable[..., Any], counts: Counter[str], name: str) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return call(*args, **kwargs)

    return counted


@pytest.mark.parametrize("name", NETS)
def test_each_operator_runs_as_seldom_as_the_layers_depend_on_it(name: str) -> None:
    """In front of a layer: never again. Beside it: once for the layer. Behind it: once for each choice."""
    network, q, stand_ins = prepared(name)
    nodes = list(q.graph_module.graph.nodes)
    counts: Counter[str] = Counter()
    for node in nodes:
        if node.op == "call_function":
            node.target = counting(node.target, counts, node.name)
        elif node.op == "call_module":
            module = q.graph_module.get_submodule(str(node.target))
            module.register_forward_pre_hook(lambda *_, name=node.name: counts.update([name]))
    measured = {"three": stand_ins["three"]} if "three" in stand_ins else {"one#2": stand_ins["one#2"]}

    prices(network, q, measured)

    (layer,) = [node for node in nodes if str(node.target) in measured]
    behind = {layer}
    for node in nodes:
        if behind.intersection(node.all_input_nodes):
            behind.add(node)
    position = nodes.index(layer)
    for node in nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        if nodes.index(node) < position:
            assert counts[node.name] == 1, node
        elif node in behind:
            assert counts[node.name] == 1 + (0 if node is layer else 3), node
        else:
            assert counts[node.name] <= 1 + 1, node
    assert all(each.calls == 1 for each in stand_ins[layer.target] if isinstance(each, Blurred))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_choice_whose_loss_is_not_finite_has_an_infinite_price(value: float) -> None:
    network, q, stand_ins = prepared("residual")

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = q.layers["head"](x)
            return torch.where(torch.arange(len(y))[:, None] == 0, torch.full_like(y, value), y)

    stand_ins["head"][1] = Broken()

    base, rises = prices(network, q, stand_ins, sizes=[4, 20])

    assert math.isfinite(base)
    assert rises["head"][1] == math.inf
    others = [price for layer, row in rises.items() for i, price in enumerate(row) if (layer, i) != ("head", 1)]
    assert all(map(math.isfinite, others))


def test_finished_batches_are_not_measured_again_and_give_the_same(tmp_path: Path) -> None:
    network, q, stand_ins = prepared("branches")
    kept = Checkpoint(tmp_path)
    first = prices(network, q, stand_ins, sizes=[8, 16], checkpoint=kept)
    assert first == prices(network, q, stand_ins, sizes=[8, 16])
    kept.path("prices 0").unlink()
    visited: list[str] = []

    again = prices(network, q, stand_ins, sizes=[8, 16], checkpoint=kept, on_layer=visited.append)

    assert again == first
    assert visited == list(q.layers)  # of the batch whose piece was lost


def test_a_layer_without_choices_has_no_price_and_costs_nothing() -> None:
    network, q, stand_ins = prepared("twice")
    visited: list[str] = []

    _, rises = prices(network, q, {"one": stand_ins["one"]}, on_layer=visited.append)

    assert list(rises) == ["one"]
    assert visited == ["one"]


# ---- fewer rows


def numbered(sizes: list[int]) -> list[Batch]:
    """Batches of rows that know their number."""
    total = torch.arange(float(sum(sizes)))
    return [{"x": part[:, None]} for part in networks.pieces(total, sizes)]


def tensor(batch: Batch, name: str = "x") -> Tensor:
    value = batch[name]
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("sizes", [[50, 50, 50, 10], [7], [1] * 30, [3, 100, 3]])
@pytest.mark.parametrize("count", [1, 2, 13, 32, 100, 1000])
def test_thinning_keeps_as_many_rows_as_asked_evenly_spread(sizes: list[int], count: int) -> None:
    kept = torch.cat([tensor(batch) for batch in thin(numbered(sizes), count)]).flatten()

    total = sum(sizes)
    assert len(kept) == min(count, total)
    assert kept.tolist() == sorted(set(kept.tolist()))
    if count > 1:
        assert kept[0] == 0
        assert kept[-1] == total - 1
        gaps = kept.diff()
        assert gaps.max() - gaps.min() <= 1
    assert all(1 <= rows(batch) <= PRICED_ROWS for batch in thin(numbered(sizes), count))


def test_thinned_rows_of_several_batches_are_joined() -> None:
    assert [rows(batch) for batch in thin(numbered([10] * 10), 40)] == [32, 8]


def test_large_inputs_come_in_smaller_batches() -> None:
    batch: Batch = {"x": torch.zeros(40, 1).expand(40, 300_000)}

    assert max(rows(part) for part in thin([batch], 40)) == 5  # 1.5 million values at a time


def test_thinning_never_mixes_forms() -> None:
    pieces: list[Batch] = []
    for index in range(6):
        x = torch.full((4, 2 + index % 2), float(index))
        pieces.append({"x": x, "options": {"mask": torch.zeros(4, dtype=torch.bool)}, "flag": index >= 3})

    kept = thin(pieces, 12)

    assert sum(map(rows, kept)) == 12
    for batch in kept:
        values = torch.unique(tensor(batch))
        assert len({(int(value) % 2, int(value) >= 3) for value in values}) == 1
        assert batch["flag"] == (values[0].item() >= 3)
        mask = flatten({"options": batch["options"]})[0][0]
        assert len(mask) == rows(batch)


def test_a_tensor_that_all_rows_share_stays_whole_and_its_own() -> None:
    # 5 of 50 rows are kept of each batch: the shared tensor has as many entries, and is not one of them
    pieces: list[Batch] = [{"x": torch.full((50, 1), float(i)), "table": torch.arange(5.0) + i // 2} for i in range(4)]

    kept = thin(pieces, 20)

    assert sum(map(rows, kept)) == 20
    for batch in kept:
        assert torch.equal(tensor(batch, "table"), torch.arange(5.0) + tensor(batch)[0, 0] // 2)
        assert (tensor(batch) // 2 == tensor(batch)[0, 0] // 2).all()


def test_long_shared_tensors_that_print_alike_are_not_mixed() -> None:
    table = torch.zeros(2000)
    other = table.index_fill(0, torch.tensor([1000]), 1.0)
    pieces: list[Batch] = [{"x": torch.full((4, 1), float(i)), "table": t} for i, t in enumerate((table, other))]

    kept = thin(pieces, 8)

    assert [torch.unique(tensor(batch)).tolist() for batch in kept] == [[0.0], [1.0]]
    assert [tensor(batch, "table").sum().item() for batch in kept] == [0.0, 1.0]
