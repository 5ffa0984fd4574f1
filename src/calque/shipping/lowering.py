"""The quantized network with its quantizers and layers as named custom operators, ready for torch.onnx.

The operators carry names only. Their meaning in ONNX, with every constant, is written by `calque.shipping.nodes`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import onnxscript
import torch
import torch.nn.functional as F
from onnx.defs import OpSchema
from torch import Tensor, fx, nn

from calque.network.network import (
    ADDITIONS,
    AVERAGE_POOLS,
    CONCATENATIONS,
    clamp_bounds,
    is_movement,
    is_spatial_mean,
    value_of,
)
from calque.network.rewrites.functional import free_name
from calque.quantized.assembled import grid_of
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.shipping.spatial import RESIZES, write_exactly

DOMAIN = "calque"
QUANTIZE, LAYER, TABLE = "Quantize", "Layer", "Table"

aten = torch.ops.aten


@torch.library.custom_op("calque::quantize", mutates_args=())
def _quantize(x: Tensor, name: str, highest: int) -> Tensor:
    return x.clone()


@_quantize.register_fake
def _(x: Tensor, name: str, highest: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("calque::layer", mutates_args=())
def _layer(
    x: Tensor, weight: Tensor, name: str, pads: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    result: Tensor = _layer_shape(x, weight, name, pads, stride, dilation, groups)
    return result


@_layer.register_fake
def _layer_shape(
    x: Tensor, weight: Tensor, name: str, pads: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Stands for the layer in shape only; a linear layer has no pads."""
    if not pads:
        return F.linear(x, weight)
    padded = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
    return F.conv2d(padded, weight, None, stride, 0, dilation, groups)


@torch.library.custom_op("calque::table", mutates_args=())
def _table(x: Tensor, weight: Tensor, name: str) -> Tensor:
    return F.embedding(x, weight)


@_table.register_fake
def _(x: Tensor, weight: Tensor, name: str) -> Tensor:
    return F.embedding(x, weight)


@torch.library.custom_op("calque::global_average", mutates_args=())
def _global_average(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


@_global_average.register_fake
def _(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _symbol(name: str, kind: str = "tensor(float)") -> onnxscript.values.Op:
    """A one-input operator of calque's own ONNX domain with a string and an integer attribute; it returns floats."""
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("x", kind)],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
        attributes=[
            OpSchema.Attribute("name", OpSchema.AttrType.STRING, ""),
            OpSchema.Attribute("highest", OpSchema.AttrType.INT, "", required=False),
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


_QUANTIZE_SYMBOL, _LAYER_SYMBOL, _TABLE_SYMBOL = _symbol(QUANTIZE), _symbol(LAYER), _symbol(TABLE, "tensor(int64)")


def _translate_quantize(x, name: str, highest: int):  # type: ignore[no-untyped-def]  # onnxscript traces it
    return _QUANTIZE_SYMBOL(x, name=name, highest=highest)


def _translate_layer(x, weight, name: str, pads, stride, dilation, groups):  # type: ignore[no-untyped-def]
    return _LAYER_SYMBOL(x, name=name)


def _translate_table(x, weight, name: str):  # type: ignore[no-untyped-def]
    return _TABLE_SYMBOL(x, name=name)


def _translate_global_average(x):  # type: ignore[no-untyped-def]
    return onnxscript.opset21.GlobalAveragePool(x)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.calque.global_average.default: _translate_global_average,
    torch.ops.calque.quantize.default: _translate_quantize,
    torch.ops.calque.layer.default: _translate_layer,
    torch.ops.calque.table.default: _translate_table,
    **RESIZES,
}


class _NamedQuantizer(nn.Module):
    def __init__(self, name: str, highest: int):
        super().__init__()
        self.name = name
        self.highest = highest

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.calque.quantize(x, self.name, self.highest)  # type: ignore[no-any-return]


class _NamedLayer(nn.Module):
    def __init__(self, name: str, layer: QuantizedLayer):
        super().__init__()
        self.name = name
        geometry = layer.geometry
        self.register_buffer("weight", layer.weight)
        self.pads = list(geometry.padding) if geometry.kind == "convolution" else []
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        if geometry.kind == "embedding":
            return torch.ops.calque.table(x.long(), self.weight, self.name)  # type: ignore[no-any-return]
        return torch.ops.calque.layer(  # type: ignore[no-any-return]
            x,
            self.weight,
            self.name,
            self.pads,
            list(geometry.stride),
            list(geometry.dilation),
            geometry.groups,
        )


def lower(model: QuantizedModel, *, fused: bool = True) -> fx.GraphModule:
    """A copy of the network's operators for `torch.onnx.export` with TRANSLATIONS.

    Clips that a quantizer implies are gone, spatial means are average pools, only tensors are returned, and what ONNX Runtime
    would compute otherwise is written with other operators.

    Args:
        fused: values that were only moved are put on their grid again, so that runtimes that fuse see a quantized operand.
    """
    module = copy.deepcopy(model.graph_module)
    graph = module.graph
    quantizers = {node: _quantizer(module, node) for node in graph.nodes if _quantizer(module, node) is not None}
    highest = {node: grid.qmax for node, grid in quantizers.items() if grid is not None}
    for node in list(quantizers):
        _drop_implied_clip(graph, node, quantizers, highest)
    _means_as_pools(graph, quantizers, highest)
    if fused:
        _requantize_moved(module, quantizers, highest)
    write_exactly(graph, lambda node: behind(model.layers, node))
    names = {node: model.edge_name(node) for node in graph.nodes if node in quantizers}
    for index, (node, name) in enumerate(names.items()):
        leaf = free_name(module, f"named_{index}")
        module.add_module(leaf, _NamedQuantizer(name, highest[node]))
        node.target = leaf
    for name, layer in model.layers.items():
        module.set_submodule(name, _NamedLayer(name, layer))
    _return_tensors(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _return_tensors(graph: fx.Graph) -> None:
    """Drops outputs that are no tensors (sizes), which a file cannot have."""
    (output,) = graph.find_nodes(op="output")
    leaves = output.args[0]
    assert isinstance(leaves, (list, tuple))
    output.args = (tuple(leaf for leaf in leaves if value_of(leaf) is not None),)


def _quantizer(module: fx.GraphModule, node: fx.Node) -> Quantizer | None:
    if node.op != "call_module":
        return None
    found = module.get_submodule(str(node.target))
    return found if isinstance(found, Quantizer) else None


def _drop_implied_clip(
    graph: fx.Graph, node: fx.Node, quantizers: dict[fx.Node, Quantizer | None], highest: dict[fx.Node, int]
) -> None:
    """Removes a clip in front of the quantizer whose bounds, as codes, saturation and an integer Min give as well."""
    clip, grid = node.args[0], quantizers[node]
    assert isinstance(clip, fx.Node)
    assert grid is not None
    bounds = clamp_bounds(clip) if clip.op == "call_function" else None
    if bounds is None or len(clip.users) != 1:
        return
    ends = torch.tensor(bounds, dtype=torch.float32) / grid.scale.cpu()
    low, high = (ends.round() + grid.zero_point.cpu()).clamp(grid.qmin, grid.qmax).tolist()
    if low != grid.qmin:
        return
    highest[node] = int(high)
    source = clip.args[0]
    assert isinstance(source, fx.Node)
    clip.replace_all_uses_with(source)
    graph.erase_node(clip)


def _means_as_pools(graph: fx.Graph, quantizers: dict[fx.Node, Quantizer | None], highest: dict[fx.Node, int]) -> None:
    """Spatial means as ONNX's GlobalAveragePool, which has an integer kernel; torch.onnx would write ReduceMean."""
    for node in list(graph.nodes):
        value, source = value_of(node), node.args[0] if node.args else None
        adaptive = node.target is aten.adaptive_avg_pool2d.default and node.args[1] in ([1, 1], (1, 1))
        if value is None or not (is_spatial_mean(node) or (adaptive and value.dim() == 4)):
            continue
        readers = list(node.users)
        with graph.inserting_before(node):
            pooled = graph.call_function(torch.ops.calque.global_average.default, (source,))
            if value.dim() == 2:
                if len(readers) == 1 and readers[0] in quantizers:  # the pool's kernel wants its quantizer right behind
                    origin = readers[0]
                    pooled = graph.call_module(str(origin.target), (pooled,))
                    quantizers[pooled], highest[pooled] = quantizers[origin], highest[origin]
                pooled = graph.call_function(aten.flatten.using_ints, (pooled, 1))
        pooled.meta = dict(node.meta)
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)


def _requantize_moved(
    module: fx.GraphModule, quantizers: dict[fx.Node, Quantizer | None], highest: dict[fx.Node, int]
) -> None:
    """Puts a moved value on its grid once more (which changes nothing) where an integer operator reads it."""
    graph = module.graph
    integer = ADDITIONS | CONCATENATIONS | AVERAGE_POOLS | {torch.ops.calque.global_average.default}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_movement(node) or value_of(node) is None:
            continue
        grid = grid_of(module, node)
        readers = [r for r in node.users if r.target in integer or _is_layer(module, r)]
        if grid is None or not readers:
            continue
        origin = next(known for known, quantizer in quantizers.items() if quantizer is grid)
        with graph.inserting_after(node):
            again = graph.call_module(str(origin.target), (node,))
            again.meta = dict(node.meta)  # its shape, which pools behind it are written by
        for reader in readers:
            reader.replace_input_with(node, again)
        quantizers[again], highest[again] = grid, highest[origin]


def behind(layers: Mapping[str, object], node: fx.Node) -> str:
    """Where a node stands, in words: the nearest layer that its value comes from."""
    front = list(node.all_input_nodes)
    while front:
        current = front.pop(0)
        if current.op == "call_module" and str(current.target) in layers:
            return f"behind layer {current.target}"
        front.extend(current.all_input_nodes)
    return "in front of every layer"


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), QuantizedLayer)
