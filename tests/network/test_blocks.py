import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from calque.network import Network, capture
from calque.network.blocks import Block, axis_of, find_blocks
from calque.network.network import aten


def captured(model: nn.Module, channels: int = 4) -> Network:
    return capture(model.eval(), {"x": networks.images(5, seed=0, channels=channels)}, {})


def convolution(size: int = 3, inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def test_a_residual_block_reaches_from_its_input_to_the_clip_behind_its_add(trained: networks.Residual) -> None:
    network = capture(trained, {"image": networks.images(5, seed=0)}, {})

    (block,) = find_blocks(network)

    assert block.layers == ("conv1", "conv2")
    assert block.input is network.layers["stem"].result
    assert block.end.target is aten.relu.default
    assert block.end.args[0].target is aten.add.Tensor  # type: ignore[union-attr]
    assert [node.target for node in block.nodes] == [
        "conv1", aten.relu.default, "conv2", aten.add.Tensor, aten.relu.default
    ]  # fmt: skip


def test_a_convolution_on_the_shortcut_belongs_to_the_block() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = F.relu(net.second(F.relu(net.first(x))) + net.shortcut(x))
        y: Tensor = net.head(x.flatten(1))
        return y

    parts = {"stem": convolution(), "first": convolution(), "second": convolution(), "shortcut": convolution(1)}
    network = captured(networks.Net(forward, **parts, head=nn.Linear(4 * networks.SIDE**2, 3)))

    (block,) = find_blocks(network)

    assert set(block.layers) == {"first", "second", "shortcut"}


def test_consecutive_blocks_share_the_tensor_between_them() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        x = F.relu(net.second(F.relu(net.first(x))) + x)
        return F.relu(net.fourth(F.relu(net.third(x))) + x)

    network = captured(networks.Net(forward, **{n: convolution() for n in ("first", "second", "third", "fourth")}))

    one, other = find_blocks(network)

    assert (one.layers, other.layers) == (("first", "second"), ("third", "fourth"))
    assert one.input.op == "placeholder"
    assert other.input is one.end


def test_the_branches_of_a_fire_module_are_a_block_up_to_their_concatenation() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        x = F.relu(net.squeeze(x))
        x = torch.cat([F.relu(net.small(x)), F.relu(net.large(x))], 1)
        y: Tensor = net.head(x)
        return y

    parts = {"squeeze": convolution(1), "small": convolution(1), "large": convolution(3), "head": convolution(1, 8)}
    network = captured(networks.Net(forward, **parts))

    (block,) = find_blocks(network)

    assert block.layers == ("small", "large")
    assert block.end.target is aten.cat.default
    assert block.input is network.layers["squeeze"].result


def test_a_chain_without_shortcuts_has_no_blocks() -> None:
    assert find_blocks(capture(networks.small(), {"input": networks.images(5, seed=0)}, {})) == []


def test_a_shortcut_around_everything_makes_the_network_one_block() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        y: Tensor = net.third(F.relu(net.second(F.relu(net.first(x))))) + x
        return y

    network = captured(networks.Net(forward, first=convolution(), second=convolution(), third=convolution()))

    (block,) = find_blocks(network)

    assert block.layers == ("first", "second", "third")
    assert block.input.op == "placeholder"
    assert block.end.target is aten.add.Tensor


def test_an_input_that_two_layers_read_enters_a_block() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        y: Tensor = F.relu(net.left(x)) + F.relu(net.right(x))
        return y

    (block,) = find_blocks(captured(networks.Net(forward, left=convolution(), right=convolution())))

    assert (block.input.op, block.layers) == ("placeholder", ("left", "right"))


def test_an_inner_shortcut_is_no_block_of_its_own_inside_a_larger_one() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        y = F.relu(net.first(x))
        y = net.third(F.relu(net.second(y))) + y
        z: Tensor = y + x
        return z

    (block,) = find_blocks(
        captured(networks.Net(forward, first=convolution(), second=convolution(), third=convolution()))
    )

    assert block.layers == ("first", "second", "third")


def test_a_result_that_is_also_returned_cuts_nothing_behind_it() -> None:
    def forward(net: networks.Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(net.stem(x))
        return x, F.relu(net.second(F.relu(net.first(x))) + x)

    network = captured(networks.Net(forward, stem=convolution(), first=convolution(), second=convolution()))

    assert find_blocks(network) == []


def test_a_block_with_a_single_layer_is_none() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        y: Tensor = net.only(x) + x
        return y

    assert find_blocks(captured(networks.Net(forward, stem=convolution(), only=convolution()))) == []


def shuffled(net: networks.Net, x: Tensor) -> Tensor:
    """A channel shuffle that reads its sizes, inside a residual block."""
    x = F.relu(net.stem(x))
    y = F.relu(net.first(x))
    y = y.view(x.size(0), 2, 2, x.size(2), x.size(3)).transpose(1, 2).reshape(x.size(0), 4, x.size(2), x.size(3))
    z: Tensor = net.second(y) + x
    return z


@pytest.mark.parametrize("free", [False, True])
def test_sizes_taken_of_an_earlier_tensor_do_not_hide_a_block(free: bool) -> None:
    model = networks.Net(shuffled, stem=convolution(), first=convolution(), second=convolution())
    axes = {"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}} if free else {}
    network = capture(model, {"x": torch.cat([networks.images(5, seed=0, channels=4)] * 2, 3)}, axes)

    (block,) = find_blocks(network)

    assert block.layers == ("first", "second")
    sizes = {source for node in block.nodes for source in node.all_input_nodes} - {block.input, *block.nodes}
    assert {axis_of(size, block.input) for size in sizes} == ({0, 2, 3} if free else {0})


def test_every_node_of_a_block_depends_on_its_input_alone(trained: networks.Residual) -> None:
    network = capture(trained, {"image": networks.images(5, seed=0)}, {})

    for block in find_blocks(network):
        assert outside_readers(block) <= {block.end, block.input}
        for node in block.nodes:
            assert {*node.all_input_nodes} <= {block.input, *block.nodes}


def outside_readers(block: Block) -> set[object]:
    """The nodes of a block that something behind it reads."""
    return {node for node in block.nodes if any(user not in block.nodes for user in node.users)}
