"""Captures a network with `torch.export` and rewrites it into a `Network`."""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calque.errors import CaptureError
from calque.network.compare import FAST_PATH, differs_by_fast_path
from calque.network.copies import private_copy
from calque.network.exclusive import exclusively
from calque.network.layers import Geometry, WeightedLayer
from calque.network.names import beside_inner
from calque.network.network import Network, find_layers, flat_inputs, padding_of, value_of
from calque.network.rewrites.fold import fold_batch_norms
from calque.network.rewrites.forms import unify_layers
from calque.network.rewrites.functional import (
    constant_sources,
    constant_value,
    drop_unread_buffers,
    erase_with_constants,
    free_name,
    functionalize,
    path_of,
)
from calque.network.rewrites.products import decompose_attention, find_products
from calque.network.rewrites.regions import control_flow, in_float32
from calque.network.signature import Batch, Signature, cut, flatten, layout_of, length
from calque.network.spelling import spelling_notes
from calque.network.surroundings import undisturbed
from calque.network.trace import DynamicAxes, distinct, require_float32, trace
from calque.network.uncovered import uncovered, unreached

log = logging.getLogger(__name__)
aten = torch.ops.aten
_AUTOCAST = "torch.autocast in forward lowers values to"
_SPOKEN_FOR = frozenset(
    {"getattr", "torch", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree"}
)  # by code that fx writes
_LAYER_TYPES = (
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "Linear",
    "Embedding",
    "Conv1D",
)  # the last is transformers' linear layer


@undisturbed
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
    signature = replace(Signature.of(model), layout=layout_of(example))
    count = length(example)
    batch = distinct(cut(example, torch.arange(2).clamp(max=count - 1)))
    device = next(leaf.device.type for leaf in flatten(batch)[0] if isinstance(leaf, Tensor))
    with exclusively(), in_float32(device) as lowered:
        network = _rewritten(model, batch, dynamic, signature)
        notes = [f"{_AUTOCAST} {', '.join(map(str, lowered))}; here they are computed in float32."] if lowered else []
        notes += spelling_notes(model)
        for size in (2, 3):  # the traced batch size, and another
            if differs_by_fast_path(model, network, cut(example, torch.arange(size) % count)):
                notes.append(FAST_PATH)
    return replace(network, left_float=(*dict.fromkeys(notes), *network.left_float))


def _rewritten(model: nn.Module, batch: Batch, dynamic: DynamicAxes | None, signature: Signature) -> Network:
    """The traced network, its layers in one form and its batch norms folded."""
    module, graph, out_spec = _traced(model, batch, dynamic)
    in_spec = module._in_spec  # of (args, kwargs)
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.users}
    unify_layers(module, graph)
    decompose_attention(graph)
    flat = _flatten_calls(module, graph)
    sources = _introduce_layers(flat)
    kept, trained = fold_batch_norms(flat)
    products = find_products(flat)
    leaves = flatten(batch)[0]
    return Network(
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
        left_float=tuple(kept + control_flow(flat) + uncovered(flat, products)),
    )


def _traced(
    model: nn.Module, batch: Batch, dynamic: DynamicAxes | None
) -> tuple[fx.GraphModule, fx.Graph, pytree.TreeSpec]:
    """The model's operators, none of which writes into its arguments, their graph, and the tree of what is returned."""
    module, tree = trace(model, batch, dynamic)
    try:
        return module, functionalize(module.graph), tree
    except CaptureError:  # a write into a view: torch.export follows the aliases, but takes more operators apart
        module, tree = trace(model, batch, dynamic, functional=True)
        return module, functionalize(module.graph), tree


def _flatten_calls(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A copy of the module whose forward takes the flat inputs and returns the flat tuple of outputs."""
    flat = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":  # the guards of torch.export
            continue
        copies[node] = flat.node_copy(node, lambda old: copies[old])
        if node.op == "placeholder" and node.target in _SPOKEN_FOR:
            copies[node].target = copies[node].name
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
    nodes: dict[str, fx.Node] = {}
    modules = {name for name, _ in module.named_modules()}
    of_weights = _of_weights(module)
    for node in list(module.graph.nodes):
        geometry = _geometry(node)
        if geometry is None or node in of_weights:
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
            nodes[name] = module.graph.create_node("call_module", name, (x,))
        nodes[name].meta = dict(node.meta)
        node.replace_all_uses_with(nodes[name])
        erase_with_constants(node)
    for name, other in beside_inner({name: layer.geometry for name, layer in layers.items()}, modules).items():
        nodes[name].target = other
    layers = {str(nodes[name].target): layer for name, layer in layers.items()}
    sources = {str(nodes[name].target): source for name, source in sources.items()}
    _free_names(module, set(layers))
    for name, layer in layers.items():  # only now: a parametrized module's tensors lie under the layer's own name
        _add_submodule(module, name, layer)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    drop_unread_buffers(module)
    module.recompile()
    return sources


def _of_weights(module: fx.GraphModule) -> set[fx.Node]:
    """What computes weights from constants alone, as parametrizations with layers of their own do."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if _geometry(node) is not None:
            found |= constant_sources(_weight_and_bias(node)[0]) or set()
    return found


def _free_names(module: fx.GraphModule, layers: set[str]) -> None:
    """Moves, in place, constants that are read from below a layer's own name to the root: the layer will replace that module."""
    for node in module.graph.nodes:
        path, _, leaf = str(node.target).rpartition(".")
        if node.op != "get_attr" or not any(path == name or path.startswith(f"{name}.") for name in layers):
            continue
        own = free_name(module, str(node.target).replace(".", "_"))
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
