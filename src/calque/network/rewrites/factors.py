"""Factors of the channels of a layer's input: an operator in front of the layer, and their inverse in its weights."""

from dataclasses import replace

import torch
from torch import Tensor, fx

from calque.network.layers import Geometry, WeightedLayer
from calque.network.network import SCALED, Network
from calque.network.rewrites.functional import free_name

aten = torch.ops.aten

SCALES = "channel_scales"  # the sub-module that holds the factors, where the network has none of that name

Group = tuple[str, ...]  # layers that read one tensor


def multiply_inputs(network: Network, names: Group, scale: Tensor) -> Network:
    """The network with 1 / scale (K,) in front of these layers as a factor of its own, and scale in their weights; in place."""
    factor = insert_factor(network, names, len(network.scaled))
    path, _, leaf = str(factor.target).rpartition(".")
    holder = network.module.get_submodule(path)
    holder.register_buffer(leaf, (1 / scale).reshape(holder.get_buffer(leaf).shape))
    for name in names:
        layer = network.weighted(name)
        scaled = layer.weight * along_inputs(scale, layer.geometry, layer.weight)
        network.module.set_submodule(name, WeightedLayer(layer.geometry, scaled, layer.bias))
    network.module.recompile()
    return replace(network, scaled=(*network.scaled, names))


class _Scales(torch.nn.Module):
    """Holds factors of their own, as buffers."""


def insert_factor(network: Network, names: Group, index: int) -> fx.Node:
    """Multiplies, in place, the input of these layers by a tensor of ones under `channel_scales`; the tensor's node."""
    module, graph = network.module, network.module.graph
    readers = [network.layers[name].node for name in names]
    source = readers[0].args[0]
    assert isinstance(source, fx.Node)
    holder = next((name for name, child in module.named_children() if isinstance(child, _Scales)), "")
    if not holder:
        holder = free_name(module, SCALES)
        module.add_module(holder, _Scales())
    layer = network.weighted(names[0])
    channels = layer.weight.shape[1] * layer.geometry.groups
    shape = (channels,) if layer.geometry.kind == "linear" else (channels, 1, 1)
    module.get_submodule(holder).register_buffer(f"{index:03d}", layer.weight.new_ones(shape))
    with graph.inserting_before(readers[0]):
        factor = graph.get_attr(f"{holder}.{index:03d}")
        product = graph.call_function(aten.mul.Tensor, (source, factor))
    product.meta = {key: item for key, item in source.meta.items() if key in ("val", "tensor_meta", "nn_module_stack")}
    product.meta[SCALED] = names
    for reader in readers:
        reader.replace_input_with(source, product)
    return factor


def along_inputs(scales: Tensor, geometry: Geometry, weight: Tensor) -> Tensor:
    """Scales (C_in,) that broadcast against the weight (C_out, C_in / groups, ...)."""
    by_group = scales.reshape(geometry.groups, 1, -1).expand(-1, weight.shape[0] // geometry.groups, -1)
    return by_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))
