import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from calque.grid.bits import FLOAT, Bits, Placement
from calque.network import Network, capture
from calque.network.tensors import shared_tensors
from calque.quantized.placement import Edge, place
from networks import Net

X = networks.images(3, seed=0, channels=4)


@pytest.fixture(scope="module")
def residual() -> Network:
    return capture(networks.seeded(networks.Residual()), {"image": networks.images(3, seed=0)})


def uniform(network: Network, width: int = 4, others: dict[str, Bits] | None = None) -> dict[str, Bits]:
    return {**dict.fromkeys(network.layers, Bits(width, width)), **(others or {})}


def rows(edges: list[Edge]) -> list[tuple[str, int, str, tuple[str, ...]]]:
    return [(edge.name, edge.bits, edge.kind, edge.readers) for edge in edges]


def test_the_inputs_placement_is_the_input_of_every_layer(residual: Network) -> None:
    bits = uniform(residual, others={"stem": Bits(8, 8), "head": Bits(3, 5)})

    edges = place(residual, bits, "inputs")

    assert rows(edges) == [
        ("stem.input", 8, "input", ("stem",)),
        ("conv1.input", 4, "input", ("conv1",)),
        ("conv2.input", 4, "input", ("conv2",)),
        ("down.input", 4, "input", ("down",)),
        ("head.input", 5, "input", ("head",)),
    ]


def test_the_integer_placement_adds_operands_and_results_of_the_add_and_the_pool(residual: Network) -> None:
    """The stem feeds a 4-bit layer and a shortcut: 8 bits, requantized at the layer. conv1 feeds one layer
    alone: its grid is that layer's. Operands and results of the add and the pool have 8 bits."""
    edges = place(residual, uniform(residual), "integer")

    assert rows(edges) == [
        ("stem.input", 4, "sole", ("stem",)),
        ("stem.output", 8, "tensor", ()),
        ("conv1.input", 4, "input", ("conv1",)),
        ("conv2.input", 4, "sole", ("conv2",)),
        ("conv2.output", 8, "tensor", ()),
        (summed(residual), 8, "tensor", ()),
        ("down.input", 4, "input", ("down",)),
        ("down.output", 8, "tensor", ()),
        (pooled(residual), 8, "tensor", ()),
        ("head.input", 4, "input", ("head",)),
    ]


def node_named(network: Network, start: str) -> str:
    return next(node.name for node in network.nodes() if node.name.startswith(start))


def summed(network: Network) -> str:
    """The clip behind the add, whose value is the result of the integer kernel."""
    add = next(node for node in network.nodes() if "add.Tensor" in str(node.target))
    return next(iter(add.users)).name


def pooled(network: Network) -> str:
    return node_named(network, "adaptive_avg_pool2d")


def test_an_eight_bit_layer_uses_the_grid_of_an_eight_bit_tensor(residual: Network) -> None:
    edges = {edge.name: edge for edge in place(residual, uniform(residual, 8), "integer")}

    assert edges["stem.output"].readers == ("conv1",)
    assert edges[summed(residual)].readers == ("down",)
    assert edges[pooled(residual)].readers == ("head",)
    assert "conv1.input" not in edges


def test_a_tensor_entry_sets_the_bits_of_a_shared_tensor(residual: Network) -> None:
    edges = {
        edge.name: edge for edge in place(residual, uniform(residual, others={"stem.output": Bits(None, 4)}), "integer")
    }

    assert edges["stem.output"].bits == 4
    assert edges["stem.output"].readers == ("conv1",)


def test_a_float_tensor_has_no_grid_and_its_reader_quantizes_for_itself(residual: Network) -> None:
    edges = {edge.name: edge for edge in place(residual, uniform(residual, others={"stem.output": FLOAT}), "integer")}

    assert "stem.output" not in edges
    assert edges["conv1.input"].kind == "input"


def test_float_layers_have_no_input_grid(residual: Network) -> None:
    placements: tuple[Placement, ...] = ("inputs", "integer")
    for placement in placements:
        edges = place(residual, uniform(residual, others={"conv2": FLOAT}), placement)

        assert not any("conv2" in edge.readers for edge in edges)


def test_weights_alone_put_no_tensor_on_a_grid(residual: Network) -> None:
    assert place(residual, dict.fromkeys(residual.layers, Bits(4, None)), "integer") == []


def test_every_edge_has_a_name_of_its_own(residual: Network) -> None:
    names = [edge.name for edge in place(residual, uniform(residual), "integer")]

    assert len(set(names)) == len(names)


def fan_out(net: Net, x: Tensor) -> object:
    y = F.relu(net.squeeze(x))
    return torch.cat([F.relu(net.left(y)), F.relu(net.right(y))], 1)


def squeeze() -> Network:
    return capture(
        Net(fan_out, squeeze=nn.Conv2d(4, 4, 1), left=nn.Conv2d(4, 4, 1), right=nn.Conv2d(4, 4, 3, padding=1)),
        {"x": X},
    )


def test_layers_of_equal_bits_that_alone_read_a_tensor_share_one_grid() -> None:
    edges = place(squeeze(), dict.fromkeys(("squeeze", "left", "right"), Bits(4, 4)), "integer")

    shared = next(edge for edge in edges if "left" in edge.readers)
    assert shared.kind == "sole"
    assert shared.readers == ("left", "right")


def test_layers_of_unlike_bits_read_one_tensor_through_grids_of_their_own() -> None:
    bits = {"squeeze": Bits(4, 4), "left": Bits(4, 4), "right": Bits(4, 8)}

    edges = {edge.name: edge for edge in place(squeeze(), bits, "integer")}

    assert edges["squeeze.output"].readers == ("right",)
    assert edges["left.input"].kind == "input"


def test_a_concatenation_and_its_operands_are_on_grids() -> None:
    network = squeeze()

    tensors = set(shared_tensors(network).values())

    assert {"left.output", "right.output", node_named(network, "cat")} <= tensors


@pytest.mark.parametrize(
    ("pool", "result"),
    [
        (lambda x: F.max_pool2d(x, 2), False),
        (lambda x: F.avg_pool2d(x, 2), True),
        (lambda x: x.mean((2, 3), keepdim=True), True),
        (lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1), False),
    ],
    ids=["max", "average", "spatial mean", "channel mean"],
)
def test_a_pool_reads_a_grid_and_only_an_averaging_one_makes_another(pool: object, result: bool) -> None:
    assert callable(pool)
    network = capture(
        Net(lambda net, x: net.b(pool(F.relu(net.a(x)))), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)),
        {"x": X},
    )

    edges = place(network, uniform(network), "integer")

    tensors = [edge for edge in edges if edge.kind == "tensor" and edge.name not in ("a.output", "b.output")]
    assert len(tensors) == result
    assert "a.output" in [edge.name for edge in edges]


def test_a_layer_read_through_movements_alone_is_on_its_readers_grid() -> None:
    network = capture(
        Net(lambda net, x: net.b(F.relu(net.a(x)).flatten(1)), a=nn.Conv2d(4, 4, 1), b=nn.Linear(256, 3)),
        {"x": X},
    )

    edges = place(network, uniform(network), "integer")

    assert rows(edges) == [("a.input", 4, "sole", ("a",)), ("b.input", 4, "sole", ("b",))]
    assert edges[1].source is network.layers["a"].result


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.a(x).flatten(2).max(2).values),
        lambda net, x: net.b(net.a(x).flatten(2).topk(4)[0][:, :, 0]),
    ],
    ids=["max", "topk"],
)
def test_an_operator_that_returns_a_tuple_gets_no_grid(forward: object) -> None:
    assert callable(forward)
    network = capture(Net(forward, a=nn.Conv2d(4, 4, 1), b=nn.Linear(4, 2)), {"x": X})

    edges = place(network, uniform(network), "integer")

    assert all(isinstance(edge.source.meta["val"], Tensor) for edge in edges)
