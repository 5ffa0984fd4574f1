"""Costs of bits, against the report of the network that has them, arithmetic by hand and brute force."""

import functools
import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import calque
import networks
from calque.allocation.costs import Costs, activation_steps, costs, layer_size, value_shapes
from calque.grid.bits import FLOAT, Bits, Placement
from calque.network import Geometry, Network, capture
from calque.network.network import is_movement
from calque.quantized.placement import place

INPUTS = networks.images(8, seed=0)
LADDER = tuple(Bits(bits, bits) for bits in range(2, 9))


class TwoHeads(nn.Module):
    """Two outputs, a concatenation, a pool, a layer called twice and a parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.shift = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(F.relu(self.stem(image)), 2)
        y = F.relu(self.twice(F.relu(self.twice(x))))
        pooled = torch.cat([x * self.shift, y], 1).mean((2, 3))
        return {"left": self.left(pooled), "right": self.right(pooled)}


class Trunk(nn.Module):
    """A Linear whose result two heads read: a tensor that is no shared tensor, yet has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(64, 200), nn.Linear(200, 3), nn.Linear(200, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.trunk(image.flatten(1)))
        return self.left(x), self.right(x)


class Chain(nn.Module):
    """Convolution, ReLU, pool, convolution, ReLU, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.one(image)), 2)
        y: Tensor = self.head(F.relu(self.two(x)).flatten(1))
        return y


class Block(nn.Module):
    """relu(two(relu(one(x))) + x) on a convolution's result, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 64, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        y: Tensor = self.head(F.relu(self.two(F.relu(self.one(x))) + x).flatten(1))
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": networks.Residual, "two heads": TwoHeads, "trunk": Trunk, "chain": Chain, "block": Block,
}  # fmt: skip


@functools.cache
def captured(model: Callable[[], nn.Module]) -> Network:
    return capture(networks.seeded(model()), {"image": INPUTS[:4]}, {})


def costs_of(network: Network, plan: Mapping[str, str], placement: Placement = "integer") -> Costs:
    """The costs of one plan: a single choice per layer."""
    choices = {name: (Bits.parse(plan[name]),) for name in network.layers}
    return costs(network, choices, placement, {"image": INPUTS})


def total(table: Mapping[str, tuple[int, ...]]) -> int:
    return sum(only for (only,) in table.values())


def peak(found: Costs) -> int:
    return max(fixed + sum(only for (only,) in by_layer.values()) for fixed, by_layer in found.steps)


# ---- size and operations


def uniform(bits: str) -> Callable[[int], str]:
    return lambda index: bits


PLANS: dict[str, Callable[[int], str]] = {
    **{bits: uniform(bits) for bits in ("w3a5", "w4", "float")},
    "mixed": lambda index: ("w8a8", "w2a4", "w5a3", "w3", "float")[index % 5],
}


@pytest.mark.parametrize("model", ["residual", "two heads", "trunk"])
@pytest.mark.parametrize("plan", PLANS)
def test_size_and_operations_are_those_that_the_report_predicts_for_the_plan(model: str, plan: str) -> None:
    network = captured(MODELS[model])
    bits: dict[str, str] = {}
    for index, name in enumerate(network.layers):
        bits[name] = bits.get(network.shared.get(name, ""), PLANS[plan](index))  # tied layers agree
    entries = calque.Plan({name: Bits.parse(text) for name, text in bits.items()})

    q = calque.quantize(networks.seeded(MODELS[model]()), INPUTS, plan=entries, recipe="nearest", placement="inputs")
    found = costs_of(network, bits, "inputs")

    assert total(found.size) + found.fixed_size == q.report.file_size
    assert total(found.bops) == q.report.bit_operations
    assert found.float_size == q.report.float_size


def test_what_bits_and_shared_codes_save_is_as_worked_by_hand() -> None:
    network = captured(TwoHeads)
    eight, four = (costs_of(network, dict.fromkeys(network.layers, bits)) for bits in ("w8", "w4"))

    cast = 2 + len("Cast") + 2 + len("twice/codes") + 2 + len("abc") + 2 + 10  # a node of one input, and its attribute
    lengths = 2  # of values and of their tensor: one byte more above 127
    assert eight.size["twice"][0] - four.size["twice"][0] == 144 - 72 + lengths - cast
    assert 100 < eight.size["twice"][0] - eight.size["twice#2"][0] < 160  # the codes, without the node that copies them
    assert eight.float_size == 4 * ((36 + 4) + (144 + 4) + (24 + 3) + (40 + 5) + 4)


def test_operations_are_as_worked_by_hand() -> None:
    found = costs_of(captured(Chain), {"one": "w8a8", "two": "w4", "head": "float"})

    assert found.bops == {
        "one": (64 * 36 * 64,),  # 64 positions, 36 weights, 8 x 8 bits
        "two": (16 * 288 * 4 * 32,),
        "head": (384 * 32 * 32,),
    }
    assert found.float_bops == (64 * 36 + 16 * 288 + 384) * 32 * 32


def test_a_layer_that_is_called_twice_works_twice() -> None:
    found = costs_of(captured(TwoHeads), dict.fromkeys(("stem", "twice", "twice#2", "left", "right"), "w8a8"))

    assert found.bops["twice"] == found.bops["twice#2"] == (16 * 144 * 64,)


def test_the_number_of_inputs_does_not_matter() -> None:
    network = captured(networks.Residual)
    choices = dict.fromkeys(network.layers, (Bits(8, 8), Bits(4, 4)))

    one, many = (costs(network, choices, "integer", {"image": INPUTS[:n]}) for n in (1, 8))

    assert one == many


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("placement", ["integer", "inputs"])
def test_more_bits_never_cost_less(model: str, placement: Placement) -> None:
    network = captured(MODELS[model])

    found = costs(network, dict.fromkeys(network.layers, LADDER), placement, {"image": INPUTS})

    assert all(list(row) == sorted(set(row)) for row in found.bops.values())
    if placement == "integer":  # from 2 to 7 bits; at 8 a copy of a tensor that is kept at 8 is not needed
        for _, by_layer in found.steps:
            assert all(list(row[:-1]) == sorted(row[:-1]) for row in by_layer.values())


def test_more_bits_of_many_weights_never_make_a_smaller_file() -> None:
    network = capture(networks.seeded(nn.Linear(64, 64)), {"input": torch.randn(4, 64)}, {})

    (row,) = costs(
        network, {name: LADDER for name in network.layers}, "integer", {"input": torch.randn(4, 64)}
    ).size.values()

    assert list(row) == sorted(set(row))


def test_packed_codes_fill_whole_bytes() -> None:
    assert [layer_size(9, 1, bits, Geometry("linear")) - 12 for bits in range(1, 9)] == [2, 3, 4, 5, 6, 7, 8, 9]


# ---- activations


def test_the_steps_of_a_chain_are_as_worked_by_hand() -> None:
    network = captured(Chain)
    choices = {"one": (Bits(8, 8), Bits(4, 3)), "two": (Bits(8, 8), Bits(4, 4)), "head": (Bits(8, 8), Bits(8, 2))}

    steps = activation_steps(network, choices, "integer", value_shapes(network, {"image": INPUTS}))

    image, two = (64, 24), (128, 32)  # 64 values at 8 and 3 bits, 8 x 16 at 8 and 2 bits
    assert steps == (
        (0, {"one": image}),
        (256, {"one": image}),  # 4 x 64 values with their ReLU; the operand of a pool is at 8 bits
        (256, {"two": (0, 32), "head": two}),  # pooled values lie where the larger ones lay; a copy of 64 at 4 bits
        (3 * 4, {"head": two}),  # the logits are float
    )


def test_the_steps_of_a_residual_block_are_as_worked_by_hand() -> None:
    network = captured(Block)
    choices = dict.fromkeys(("stem", "one", "two", "head"), (Bits(8, 8), Bits(4, 4)))

    steps = activation_steps(network, choices, "integer", value_shapes(network, {"image": INPUTS}))

    half = (256, 128)  # 4 x 64 values at 8 and at 4 bits
    assert steps == (
        (0, {"stem": (64, 32)}),
        (256, {"stem": (64, 32)}),  # what the block reads twice is kept at 8 bits
        (256, {"one": (0, 128), "two": half}),  # at 4 bits `one` reads a copy of it
        (256 + 256, {"two": half}),  # an operand of the add is at 8 bits
        (256 + 256 + 256, {}),
        (256 + 12, {"head": (0, 128)}),
    )


def test_float_activations_take_four_bytes_a_value() -> None:
    network = captured(Chain)
    choices = dict.fromkeys(network.layers, (Bits(4, None),))

    steps = activation_steps(network, choices, "integer", value_shapes(network, {"image": INPUTS}))

    assert max(fixed + sum(only for (only,) in rows.values()) for fixed, rows in steps) == 4 * (256 + 128)


def moments(network: Network) -> list[tuple[fx.Node, set[fx.Node]]]:
    """By replaying the float network: each operator that runs, with the buffers that are alive meanwhile.

    Movements keep their input's buffer, and so does a ReLU behind an operator that it alone reads.
    """
    nodes = list(network.nodes())
    buffer: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        clips = node.target is torch.ops.aten.relu.default and source is not None and len(source.users) == 1
        kept = source if source is not None and (is_movement(node) or clips) else None
        buffer[node] = node if kept is None else buffer[kept]
    found = []
    for now, moment in enumerate(nodes):
        if buffer[moment] is not moment or moment.op in ("output", "get_attr"):
            continue
        alive = {moment}
        for made, node in enumerate(nodes):
            if node.op != "get_attr" and made <= now and any(nodes.index(reader) >= now for reader in node.users):
                alive.add(buffer[node])
        found.append((moment, alive))
    return found


def built_peak(network: Network, plan: Mapping[str, Bits], placement: Placement) -> int:
    """Bytes of the activations of the network with these bits: a value on a grid at its bits, any other in float32.

    A layer whose input is put on another grid right in front of it has a copy of that while it runs.
    """
    shapes = value_shapes(network, {"image": INPUTS})
    width, copies = {}, {}
    for edge in place(network, plan, placement):
        if edge.kind == "input":
            copies.update(dict.fromkeys(edge.readers, edge.bits))
        else:
            source = edge.source
            while source.target is torch.ops.aten.relu.default and len(source.all_input_nodes[0].users) == 1:
                source = source.all_input_nodes[0]
            width[source] = edge.bits
    peak = 0
    for moment, alive in moments(network):
        bits = sum(shapes[each].numel() * width.get(each, 32) for each in alive)
        if str(moment.target) in copies:
            bits += shapes[moment.all_input_nodes[0]].numel() * copies[str(moment.target)]
        peak = max(peak, bits)
    return peak // 8


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("placement", ["integer", "inputs"])
def test_float_memory_is_what_a_replay_finds(model: str, placement: Placement) -> None:
    network = captured(MODELS[model])
    found = costs_of(network, dict.fromkeys(network.layers, "w8a8"), placement)

    assert found.float_memory == built_peak(network, dict.fromkeys(network.layers, FLOAT), placement)


def test_the_float_memory_of_a_block_is_as_worked_by_hand() -> None:
    found = costs_of(captured(Block), dict.fromkeys(("stem", "one", "two", "head"), "w8a8"))

    assert found.float_memory == 4 * 3 * 256  # the add: two operands and the sum


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("placement", ["integer", "inputs"])
@pytest.mark.parametrize("bits", [("w8a8", "w8a4"), ("w8a6", "w2"), ("w4a2", "float")], ids=" ".join)
def test_no_plan_takes_more_activation_memory_than_its_price(
    model: str, placement: Placement, bits: tuple[str, ...]
) -> None:
    network = captured(MODELS[model])
    groups = [name for name in network.layers if name not in network.shared]
    choices = dict.fromkeys(network.layers, tuple(map(Bits.parse, bits)))
    steps = costs(network, choices, placement, {"image": INPUTS}).steps
    for picked in itertools.product(range(len(bits)), repeat=len(groups)):
        choice = dict(zip(groups, picked, strict=True))
        choice |= {name: choice[first] for name, first in network.shared.items()}
        plan = {name: choices[name][index] for name, index in choice.items()}

        priced = max(fixed + sum(row[choice[name]] for name, row in by_layer.items()) for fixed, by_layer in steps)

        assert built_peak(network, plan, placement) <= priced, picked


@pytest.mark.parametrize("model", ["chain", "block"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w8a3"])
def test_the_price_of_uniform_bits_is_what_the_network_takes(model: str, bits: str) -> None:
    network = captured(MODELS[model])
    plan = dict.fromkeys(network.layers, bits)

    expected = built_peak(network, {name: Bits.parse(text) for name, text in plan.items()}, "integer")

    assert peak(costs_of(network, plan)) == expected


class Own(nn.Module):
    """Two layers with the same weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.relu(self.one(x)))  # type: ignore[no-any-return]  # nn.Module's call


def test_a_bias_of_its_own_counts_for_a_layer_with_shared_weights() -> None:
    network = capture(networks.seeded(Own()), {"x": torch.randn(4, 6)}, {})

    assert network.shared == {"other": "one"}
    assert costs_of_any(network, "w8a8", torch.randn(4, 6)).float_size == 4 * (36 + 6 + 6)


def costs_of_any(network: Network, bits: str, x: Tensor) -> Costs:
    return costs(network, dict.fromkeys(network.layers, (Bits.parse(bits),)), "integer", {"x": x})


def test_costs_are_those_of_the_largest_inputs_whatever_their_order() -> None:
    def model() -> nn.Module:
        return networks.seeded(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
        )

    large, small = INPUTS[:6], INPUTS[6:12, :, :10, :10]
    floats = [
        calque.quantize(
            model(), batches, bits=("w8a8", "w4a4"), budget=calque.Budget(activation_memory=0.2), recipe="nearest"
        )
        for batches in ([large, small], [small, large], [large])
    ]

    assert [q.prices and q.prices.floats for q in floats] == [floats[2].prices and floats[2].prices.floats] * 3
    assert len({q.report.bit_operations for q in floats}) == 1
