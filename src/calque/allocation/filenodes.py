"""What a file holds whatever the choice of bits: operators and constants. How many bytes nodes and tensors take."""

import math
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from calque.network import Network
from calque.network.network import is_symbolic, value_of

VALUE = "abc"  # stands for the exporter's short names of values
HEAD = 650  # of the file: versions, recipe, names of domains, form of the graph, checksums of grids and float tensors
TABLES = {2: 560, 3: 780, 5: 780, 6: 780, 7: 1100}  # what decodes fields of codes, once for each width in a file
FOLDED_FROM, FOLDED_TO = 8192, 524_288  # bytes that torch.onnx reads at most to compute a constant, and writes
AXIS, TO = 13, 10  # bytes of these attributes
OPERATOR = 1000  # of an operator that is not in the table: it may become a dozen nodes
NUMBER, LISTED = 16, 8  # of a constant number in arithmetic, and of one in a list
SIZE, READ_SIZE = 80, 40  # of an operator on sizes, and where another operator reads a size
PIECE = 70  # of a piece that a tensor is taken apart to or joined of
WINDOW, FREE_WINDOWS = 450, 1800  # of a place of an uneven adaptive pool; of an axis of free size

# Bytes that torch.onnx writes for one operator on float inputs of known sizes, as measured, rounded up
_MEASURED: dict[int, str] = {
    0: "dropout alias detach contiguous clone feature_dropout getitem _assert_tensor_metadata",
    30: "relu sigmoid tanh matmul mm bmm add.Tensor mul.Tensor sub.Tensor div.Tensor eq.Scalar logical_not abs neg exp log sin "
    "cos erf sign floor ceil round hardswish mish selu maximum minimum",
    60: "softmax.int gelu cat permute transpose.int t unsqueeze squeeze squeeze.dim squeeze.dims masked_fill.Scalar elu celu "
    "leaky_relu prelu log_softmax.int log_sigmoid clamp clamp_min clamp_max hardsigmoid tril triu sqrt rsqrt reciprocal "
    "pow.Tensor_Scalar gt.Scalar lt.Scalar ge.Scalar le.Scalar ne.Scalar gt.Tensor lt.Tensor ge.Tensor le.Tensor eq.Tensor "
    "to.dtype index_select select.int view reshape _unsafe_view unflatten.int",
    90: "mean.dim layer_norm flatten.using_ints split.Tensor chunk softplus relu6 hardtanh silu amax amin sum.dim_IntList "
    "where.self argmax cumsum topk tile addcmul",
    140: "slice.Tensor expand expand_as repeat pad constant_pad_nd flip glu logsumexp "
    "max.dim min.dim prod.dim_int stack split_with_sizes unbind.int einsum movedim.int instance_norm full full_like zeros "
    "zeros_like ones ones_like new_zeros new_ones arange arange.start pixel_shuffle pixel_unshuffle",
    200: "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d gather argsort scatter.src roll lerp.Scalar diff",
    280: "index.Tensor sort group_norm rms_norm channel_shuffle nan_to_num repeat_interleave.self_int one_hot meshgrid.indexing "
    "linalg_vector_norm",
    480: "upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec",
    720: "var.dim std.dim",
}
aten = torch.ops.aten
_NODES = {name: size for size, names in _MEASURED.items() for name in names.split()}


def operator_bytes(node: fx.Node) -> int:
    """The nodes that torch.onnx writes for an operator, with their small constants."""
    known = _NODES.get(_name(node))
    if known == 0 or (node.target is aten.slice.Tensor and _shape(node.all_input_nodes[0]) == _shape(node)):
        return 0
    if known is None and _is_number(node):
        return SIZE
    arguments = [*node.args[1:], *node.kwargs.values()]
    lists = sum(len(argument) for argument in arguments if isinstance(argument, (list, tuple)))
    numbers = sum(isinstance(argument, (int, float)) for argument in arguments if _name(node).endswith(".Tensor"))
    names = sum(len(f"module.{each.target}") for each in node.all_input_nodes if each.op == "get_attr")
    sizes = sum(map(_is_number, node.all_input_nodes))
    read = READ_SIZE * sizes if sizes > 1 else 0  # a single one is -1 in a constant shape
    return (known or OPERATOR) + NUMBER * numbers + LISTED * lists + names + read + _beyond(node)


def guessed_operators(network: Network) -> list[str]:
    """The operators whose bytes have not been measured, by name."""
    _, computed = constant_bytes(network)
    calls = [node for node in network.nodes() if node.op == "call_function" and node not in computed]
    names = [_name(node) for node in calls if not _is_number(node) and node.meta.get("val") is not None]
    return [name for name in dict.fromkeys(names) if name not in _NODES]


def _name(node: fx.Node) -> str:
    """What the operator is called, without its overload where that is the default."""
    name = getattr(node.target, "__name__", "") if node.target is operator.getitem else str(node.target)
    return name.removeprefix("aten.").removesuffix(".default")


def _is_number(node: fx.Node) -> bool:
    """Whether the node's value is a size, or computed of sizes."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _beyond(node: fx.Node) -> int:
    """What grows with shapes: scales of norms that have none, pieces, the windows of pools whose sizes do not divide."""
    name, value = _name(node), value_of(node)
    if name in ("layer_norm", "rms_norm") and (len(node.args) < 3 or node.args[2] is None):
        return 4 * math.prod(size for size in node.args[1] if isinstance(size, int))  # type: ignore[union-attr, misc]
    if name in ("group_norm", "instance_norm") and value is not None:
        return 12 * int(value.shape[1])
    if name in ("unbind.int", "split_with_sizes"):
        return PIECE * len(node.meta["val"])
    if name == "stack":
        return PIECE * len(node.all_input_nodes)
    if name.startswith("adaptive_"):
        return _windows(node)
    return 0


def _windows(node: fx.Node) -> int:
    source, places = value_of(node.args[0]), node.args[1]
    assert source is not None
    assert isinstance(places, (list, tuple))
    sizes = list(zip(source.shape[-len(places) :], places, strict=True))
    if any(is_symbolic(size) and count != 1 for size, count in sizes):
        return len(sizes) * FREE_WINDOWS
    even = all(count == 1 or (isinstance(count, int) and size % count == 0) for size, count in sizes)
    return 0 if even else WINDOW * math.prod(count for count in places if isinstance(count, int))


def _shape(node: fx.Node) -> list[str]:
    value = value_of(node)
    return [] if value is None else [str(size) for size in value.shape]


def constant_bytes(network: Network) -> tuple[list[int], set[fx.Node]]:
    """Bytes of each different tensor that stays float or whole, and the operators on constants that are computed at export."""
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    values: dict[fx.Node, Tensor] = {}
    interpreter = fx.Interpreter(network.module)
    for node in network.nodes():
        if node.op == "get_attr":
            found = interpreter.fetch_attr(str(node.target))
            if isinstance(found, Tensor):
                sources[node], values[node] = frozenset([node]), found
        elif node.op == "call_function" and all(each in sources for each in node.all_input_nodes):
            found = _value(node, values)
            if found is not None:
                sources[node] = frozenset().union(*(sources[each] for each in node.all_input_nodes))
                values[node] = found
    kept: dict[tuple[object, ...], int] = {}
    computed: set[fx.Node] = set()
    for node in sources:
        if all(user in sources for user in node.users):
            continue
        whole = {each: values[each].nbytes for each in sources[node]}
        read, made = sum(whole.values()), values[node].nbytes
        folded = made <= read or (read <= FOLDED_FROM and made <= FOLDED_TO)
        computed |= {node} if folded else set()
        for each in [node] if folded else whole:
            tensor = values[each].detach().cpu().contiguous()
            content = (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            kept[content] = tensor_bytes(
                f"module.{each.target}" if each.op == "get_attr" else VALUE, tensor.shape, tensor.nbytes
            )
    for node in reversed(list(sources)):  # what only computed operators read is not written either
        if node.users and all(user in computed for user in node.users):
            computed.add(node)
    return list(kept.values()), computed


@torch.no_grad()
def _value(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """What an operator on constants returns; None where that is no tensor."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:  # drawn anew in every run
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: values[each])
    assert callable(node.target)
    found = node.target(*args, **kwargs)
    return found if isinstance(found, Tensor) else None


def node_bytes(kind: str, *names: str) -> int:
    inside = 2 + len(kind) + sum(2 + len(name) for name in names)
    return 1 + _varint(inside) + inside


def tensor_bytes(name: str, shape: Iterable[int], size: int) -> int:
    """Bytes of a constant.

    Args:
        size: of its values.
    """
    inside = sum(1 + _varint(length) for length in shape) + 4 + len(name) + 1 + _varint(size) + size
    return 1 + _varint(inside) + inside


def _varint(number: int) -> int:
    """How many bytes a number takes in a protobuf."""
    return max(1, -(-number.bit_length() // 7))
