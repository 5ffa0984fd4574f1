"""The list of what stays float against the graph and the integer evaluation: nothing is left out, nothing is listed twice."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import calque
import networks
from calque.grid.bits import Placement
from calque.network import Network, capture
from calque.network.network import result_of
from calque.network.uncovered import plain_name
from calque.quantized.integer import Accumulator, OnGrid, _Interpreter
from calque.quantized.kernels import fuse, scale_product, settle_pool
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import Quantizer
from networks import Net
from slow import slow

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(20, (24, 5), generator=torch.Generator().manual_seed(2))
MOVES = {
    "flatten", "view", "reshape", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze", "cat", "dropout",
    "max_pool2d", "expand_as", "zeros", "unflatten", "contiguous", "clone", "expand", "to", "unbind", "chunk", "split", "stack",
}  # fmt: skip


def image_forward(net: Net, x: Tensor) -> Tensor:
    y = F.silu(net.norm(net.stem(x)))
    y = y * torch.sigmoid(net.excite(F.relu(net.squeeze(y.mean((2, 3), keepdim=True)))))
    z = F.relu(net.body(y) + y)
    z = torch.cat([F.avg_pool2d(z, 2), F.interpolate(F.max_pool2d(z, 4), scale_factor=2)], 1)
    scores: Tensor = net.head(F.adaptive_avg_pool2d(F.relu6(net.late(net.last(z))), 1).flatten(1))
    return F.normalize(scores.exp() - 1).softmax(-1)


def images() -> nn.Module:
    return Net(
        image_forward, stem=nn.Conv2d(3, 8, 3, padding=1), norm=nn.BatchNorm2d(8), squeeze=nn.Conv2d(8, 4, 1),
        excite=nn.Conv2d(4, 8, 1), body=nn.Conv2d(8, 8, 3, padding=1), last=nn.Conv2d(16, 8, 1), late=nn.GroupNorm(2, 8),
        head=nn.Linear(8, 4),
    )  # fmt: skip


class Text(nn.Module):
    """A table that is indexed, a mask, attention, a bilinear form and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Parameter(torch.zeros(20, 8)), nn.Parameter(torch.zeros(8, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.memory, self.pair, self.head = nn.GRU(8, 8, batch_first=True), nn.Bilinear(8, 8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, gate: Tensor) -> Tensor:
        x = self.block(self.table[ids] * gate[..., None])
        x = torch.baddbmm(x, self.memory(x)[0], self.mix.expand(x.shape[0], -1, -1))
        y: Tensor = self.head(self.pair(x, x).tanh().amax(1))
        return y


class Ran(_Interpreter):
    """The integer evaluation, the nodes that it executes and those of them whose result is computed on integers."""

    def __init__(self, q: QuantizedModel) -> None:
        super().__init__(q.graph_module, fuse(q.graph_module), {})
        self.seen: set[str] = set()
        self.exact: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen.add(n.name)
        sums = isinstance(result, Accumulator) and _quantized(self, result_of(n))
        clip = n.op == "call_function" and _name(n) in ("relu", "relu6") and _quantized(self, n)
        kernel = bool(n.users) and all(reader.target in (settle_pool, scale_product) for reader in n.users)
        if isinstance(result, OnGrid) or sums or clip or kernel:
            self.exact.add(n.name)
        return result


def _quantized(ran: Ran, node: fx.Node) -> bool:
    """Whether quantizers alone read the node, views aside."""
    return all(
        isinstance(ran.submodules.get(str(reader.target)), Quantizer)
        or (reader.op == "call_function" and _name(reader) in MOVES and _quantized(ran, reader))
        for reader in node.users
    )


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if "." in str(node.target) else "getitem"


def expected(q: QuantizedModel, network: Network, leaves: tuple[Tensor, ...]) -> Counter[str]:
    """How many operators of which kind compute on floats, by the integer evaluation."""
    ran = Ran(q)
    with torch.no_grad():
        ran.run(*leaves)
    found: Counter[str] = Counter()
    for node in q.graph_module.graph.nodes:
        values = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
        floats = any(isinstance(value, Tensor) and value.is_floating_point() for value in values)
        computes = node.op == "call_function" and floats and _name(node) not in MOVES | {"getitem", "sym_size"}
        stays = node.name in ran.seen and node.name not in ran.exact  # a kernel stands for what was not executed
        if computes and stays and "scaled" not in node.meta:
            found[plain_name(node)] += 1
    return found


def listed(q: QuantizedModel) -> Counter[str]:
    """How many operators of which kind the report lists."""
    found: Counter[str] = Counter()
    for note in q.report.notes:
        one = re.match(r"operator (\S+?)(?:_\d+)?(?: .*)? stays float\.$", note)
        many = re.match(r"(\d+) operators (\S+) stay float: ", note)
        if one:
            found[one[1]] += 1
        elif many:
            found[many[2]] += int(many[1])
    return found


@pytest.mark.parametrize(
    ("kind", "placement", "bits"),
    [
        ("images", "integer", "w8a8"),
        ("text", "inputs", "w8a8"),
        ("residual", "integer", "w8a8"),
        ("residual", "inputs", "w4"),
        slow("images", "inputs", "w8a8"),
        slow("images", "inputs", "w4"),
        slow("text", "integer", "w8a8"),
        slow("text", "inputs", "w4"),
        slow("residual", "inputs", "w8a8"),
    ],
)
def test_the_list_of_what_stays_float_is_that_of_the_graph(kind: str, placement: Placement, bits: str) -> None:
    model, batch = {
        "images": lambda: (images(), {"x": IMAGES}),
        "text": lambda: (networks.seeded(Text()), {"ids": IDS, "gate": TOKENS[..., 0]}),
        "residual": lambda: (networks.seeded(networks.Residual()), {"image": networks.images(24, seed=0)}),
    }[kind]()
    q = calque.quantize(model, batch, bits=bits, placement=placement, recipe="fast")

    network = capture(model, batch)  # type: ignore[arg-type]
    wanted = expected(q, network, tuple(batch.values()))
    assert listed(q) == wanted
    assert (sum(wanted.values()) == 0) == ((kind, placement, bits) == ("residual", "integer", "w8a8"))


def test_tables_constant_factors_and_float_products_are_named() -> None:
    q = calque.quantize(
        networks.seeded(Text()), (IDS, TOKENS[..., 0]), bits="w8a8", recipe="nearest", override={"*matmul*": None}
    )

    assert "operator index of the table table stays float." in q.report.notes
    assert "operator baddbmm stays float." in q.report.notes
    (products,) = [note for note in q.report.notes if "operators matmul" in note]
    assert products.startswith("2 operators matmul stay float: ")
    assert "in block.self_attn" in products


def test_many_operators_of_a_kind_are_one_line_with_three_names() -> None:
    model = Net(
        lambda net, x: net.parts(x),
        parts=nn.Sequential(*(part for _ in range(5) for part in (nn.Linear(8, 8), nn.SiLU()))),
    )
    q = calque.quantize(model, TOKENS, bits="w8a8", recipe="nearest")

    assert q.report.notes[0] == ("5 operators silu stay float: in parts.1, in parts.3, in parts.5, ....")


def test_channel_scales_that_are_multiplied_in_float_are_listed() -> None:
    model = Net(lambda net, x: net.second(F.gelu(net.first(x))), first=nn.Linear(8, 32), second=nn.Linear(32, 3))
    with torch.no_grad():
        model.first.weight[5] *= 100
    q = calque.quantize(model, TOKENS, bits="w8a8", recipe="fast")

    assert q.facts.scaled == (("second",),)
    assert "inputs are multiplied by channel scales in float in front of second." in q.report.notes
    assert not any("aten.mul" in note for note in q.report.notes)
