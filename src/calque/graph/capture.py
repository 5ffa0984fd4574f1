"""Captures a network with `torch.export` and rewrites it into a `Network`."""

import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calque.errors import CaptureError
from calque.graph.fold import fold_batch_norms
from calque.graph.forms import unify_layers
from calque.graph.layers import Geometry, WeightedLayer
from calque.graph.network import Network, find_layers, flat_inputs, padding_of, value_of
from calque.graph.products import decompose_attention, find_products
from calque.graph.rewrite import (
    constant_value,
    drop_unread_buffers,
    erase_with_constants,
    functionalize,
    path_of,
)
from calque.graph.signature import Batch, Signature, flatten, rows, select
from calque.graph.trace import DynamicAxes, distinct, private_copy, require_float32, trace
from calque.graph.uncovered import uncovered, unreached

log = logging.getLogger(__name__)
aten = torch.ops.aten
_LAYER_TYPES = (
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "Linear",
    "Embedding",
    "Conv1D",
)  # the last is transformers' linear layer


def capture(model: nn.Module, example: Batch, dynamic: DynamicAxes | None = None) -> Network:
    """The network of `model` (left untouched) as `torch.export` sees it with the inputs `example`.

    Args:
        example: one calibration batch by argument name, real inputs.
        dynamic: axes besides the batch that may change, e.g. {"x": {2: Dim.AUTO, 3: Dim.AUTO}}.

    Raises:
        CaptureError: control flow on data, an operator that cannot be traced, a write into an input or a buffer, a batch
            axis that the network fixes, or a trace that computes something else than the model.
    """
    model = private_copy(model)
    require_float32(model)
    signature = Signature.of(model)
    count = rows(example)
    batch = distinct(select(example, torch.arange(max(count, 2)).clamp(max=count - 1)[:2]))
    module, graph = _traced(model, batch, dynamic)
    in_spec, out_spec = module._in_spec, module._out_spec  # tree specs of (args, kwargs) and of the result
    assert out_spec is not None
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.users}
    unify_layers(module, graph)
    decompose_attention(graph)
    flat = _flatten_calls(module, graph)
    sources = _introduce_layers(flat)
    kept, trained = fold_batch_norms(flat)
    products = find_products(flat)
    leaves = flatten(batch)[0]
    network = Network(
        flat,
        signature,
        in_spec,
        out_spec,
        inputs=flat_inputs(flat, leaves),
        constants=tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        layers=find_layers(flat),
        products=products,
        shared=_shared(flat, sources),
        trained=trained,
        unreached=unreached(model, read),
        left_float=tuple(kept + uncovered(flat, products)),
    )
    for size in (2, 3):  # the traced batch size, and another
        picked = select(example, torch.arange(size) % count)
        _compare(model, network, picked)
    return network


def _traced(model: nn.Module, batch: Batch, dynamic: DynamicAxes | None) -> tuple[fx.GraphModule, fx.Graph]:
    """The model's operators, none of which writes into its arguments, and their graph."""
    module = trace(model, batch, dynamic)
    try:
        return module, functionalize(module.graph)
    except CaptureError:  # a write into a view: torch.export follows the aliases, but takes more operators apart
        module = trace(model, batch, dynamic, functional=True)
        return module, functionalize(module.graph)


def _flatten_calls(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A copy of the module whose forward takes the flat inputs and returns the flat tuple of outputs."""
    flat = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":  # the guards of torch.export
            continue
        copies[node] = flat.node_copy(node, lambda old: copies[old])
        copies[node].name = node.name if node.op != "output" else "output"
    result = fx.GraphModule(module, flat)
    for name, tensor in [*result.named_parameters(), *result.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        owner = result.get_submodule(path)
        delattr(owner, leaf)
        owner.register_buffer(leaf, tensor.detach().clone())
    result.graph.eliminate_dead_code()
    return result


def _introduce_layers(module: fx.GraphModule) -> dict[str, str]:
    """Replaces, in place, convolutions and linear operators with constant weights by `WeightedLayer` modules.

    Returns layer name -> the node of its weight, the same for layers that share it.
    """
    calls: dict[str, int] = {}
    sources: dict[str, str] = {}
    layers: dict[str, WeightedLayer] = {}
    modules = {name for name, _ in module.named_modules()}
    for node in list(module.graph.nodes):
        geometry = _geometry(node)
        if geometry is None:
            continue
        weight, bias = (constant_value(module, argument) for argument in _weight_and_bias(node))
        x = node.args[1 if geometry.kind == "embedding" else 0]
        if weight is None or not isinstance(x, fx.Node):
            continue
        if geometry.kind == "convolution":
            geometry, x = _absorb_padding(geometry, x)
        name = _layer_name(node, calls, modules | set(layers))
        sources[name] = str(_weight_and_bias(node)[0])
        layers[name] = WeightedLayer(geometry, weight, bias)
        with module.graph.inserting_before(node):
            replacement = module.graph.create_node("call_module", name, (x,))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        erase_with_constants(node)
    _free_names(module, set(layers))
    for name, layer in layers.items():  # only now: a parametrized module's tensors lie under the layer's own name
        _add_submodule(module, name, layer)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    drop_unread_buffers(module)
    module.recompile()
    return sources


def _free_names(module: fx.GraphModule, layers: set[str]) -> None:
    """Moves, in place, constants that are read from below a layer's own name to the root: the layer will replace that module."""
    for node in module.graph.nodes:
        path, _, leaf = str(node.target).rpartition(".")
        if node.op != "get_attr" or not any(path == name or path.startswith(f"{name}.") for name in layers):
            continue
        own = str(node.target).replace(".", "_")
        while hasattr(module, own):
            own += "_"
        module.register_buffer(own, getattr(module.get_submodule(path), leaf))
        node.target = own


def _shared(module: fx.GraphModule, sources: dict[str, str]) -> dict[str, str]:
    """Layer -> the first layer with the same weight, where both are still equal after folding."""
    first: dict[str, str] = {}
    shared = {}
    for name, source in sources.items():
        earlier = first.setdefault(source, name)
        weights = [module.get_submodule(each).get_buffer("weight") for each in (name, earlier)]
        if earlier != name and torch.equal(*weights):
            shared[name] = earlier
    return shared


def _geometry(node: fx.Node) -> Geometry | None:
    if node.target is aten.linear.default:
        return Geometry("linear")
    if node.target is aten.embedding.default:
        return Geometry("embedding")
    if node.target not in (aten.conv2d.default, aten.conv2d.padding):
        return None
    value = value_of(node)
    if value is None or value.dim() != 4:  # an image without its batch axis
        return None
    options = dict(zip(("stride", "padding", "dilation", "groups"), node.args[3:], strict=False)) | dict(node.kwargs)
    stride, dilation = _pair(options.get("stride", 1)), _pair(options.get("dilation", 1))
    padding = options.get("padding", 0)
    if padding == "same":
        weight = value_of(node.args[1])
        assert weight is not None
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        top, left = (0, 0) if padding == "valid" else _pair(padding)
        sides = (top, left, top, left)
    return Geometry("convolution", stride, sides, dilation, int(str(options.get("groups", 1))))


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return (int(values[0]), int(values[-1]))


def _absorb_padding(geometry: Geometry, x: fx.Node) -> tuple[Geometry, fx.Node]:
    """The geometry with a zero padding in front of the convolution taken into its own, and the node before it."""
    amounts = padding_of(x)
    if amounts is None or len(amounts) not in (2, 4) or min(amounts) < 0 or not isinstance(x.args[0], fx.Node):
        return geometry, x
    left, right, above, below = [*amounts, 0, 0][:4]
    top, start, bottom, end = geometry.padding
    padding = (top + above, start + left, bottom + below, end + right)
    return Geometry(geometry.kind, geometry.stride, padding, geometry.dilation, geometry.groups), x.args[0]


def _weight_and_bias(node: fx.Node) -> tuple[object, object]:
    if node.target is aten.embedding.default:
        return node.args[0], None
    return node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _layer_name(node: fx.Node, calls: dict[str, int], taken: set[str]) -> str:
    """The path of the module that is called, "#2" appended to its second call; the node's name where none is the layer.

    A module is the layer where the weight is its own, or where it is a Conv2d or Linear whose weight is computed or shared.
    Weights below the module that reads them name the layer themselves, as those of nn.MultiheadAttention: `in_proj`, `out_proj`.
    A node whose name is `taken` gets an underscore.
    """
    weight, _ = _weight_and_bias(node)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = path_of(node)
    target = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
    own = target == f"{path}.weight"
    if path and not own and target.startswith(f"{path}.") and target.endswith("weight"):
        path, own = target.removesuffix("weight").rstrip("._"), True
    if not path or not (own or _is_layer_type(stack[-1][1])):
        name = node.name
        while name in taken:
            name += "_"
        return name
    calls[path] = calls.get(path, 0) + 1
    return path if calls[path] == 1 else f"{path}#{calls[path]}"


def _is_layer_type(kind: object) -> bool:
    text = kind if isinstance(kind, str) else getattr(kind, "__qualname__", "")
    return text.rpartition(".")[2].removeprefix("Parametrized") in _LAYER_TYPES


def _add_submodule(module: fx.GraphModule, name: str, layer: WeightedLayer) -> None:
    """Puts the layer at its dotted name; containers that tracing left out are made."""
    owner: nn.Module = module
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(owner, part, None), nn.Module):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.add_module(leaf, layer)


def _compare(model: nn.Module, network: Network, batch: Batch) -> None:
    with torch.no_grad():
        try:
            expected = pytree.tree_leaves(model(**distinct(batch)))
            received = network.module(*flatten(batch)[0])
        except Exception as error:
            raise CaptureError(
                f"the network fails on a batch of {rows(batch)} rows: {str(error).splitlines()[0]} It was traced with 2; "
                "it must accept any number of rows on axis 0 of its inputs."
            ) from error
    sizes = [_size(leaf) for leaf in expected]
    for position, (a, b) in enumerate(zip(expected, received, strict=True)):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        if not torch.isfinite(a).all():  # calibration names the layer
            continue
        # an output may be but the rounding errors of the others
        tolerance = 1e-3 * sizes[position] + min(1e-6, 1e-6 * max(sizes))
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0.0, atol=tolerance):
            raise CaptureError(
                f"output {position} of the captured network differs from the model's on a batch of {rows(batch)} rows. The "
                "model must be a function of its inputs alone: no randomness, no state that changes between calls."
            )


def _size(leaf: object) -> float:
    """The largest finite absolute value of an output."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return 0.0
    finite = leaf[torch.isfinite(leaf)]
    return finite.abs().max().item() if finite.numel() else 0.0
