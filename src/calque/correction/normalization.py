"""Para-normalization: each quantized layer's channel mean and variance put back to the float network's.

Source: Hubara et al. 2021, section 3.3 (batch-norm tuning), re-estimated exactly instead of by momentum. The paper's target
is the trained beta and gamma^2 (`trained_statistics`). On a small calibration set the float network itself does not have those,
so the default is its own mean and variance of the same layer output on the same inputs: then it is a fixed point.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calque.calibration.batches import real_tokens
from calque.calibration.channel_statistics import ChannelStatistics
from calque.calibration.execution import Execution
from calque.grid.arithmetic import SMALLEST_SCALE, per_channel
from calque.network import Batch, WeightedLayer
from calque.network.rewrites.fold import folded
from calque.quantized.assembled import grid_of, link_requantization
from calque.quantized.in_pieces import InPieces
from calque.quantized.modules import QuantizedLayer
from calque.run.spill import Store

GAIN_LIMITS = (0.5, 2.0)  # a channel that became (nearly) constant must not be amplified


Rescalable = QuantizedLayer | WeightedLayer


def absorb(layer: Rescalable, gain: Tensor, offset: Tensor, input_scale: Tensor | None = None) -> Rescalable:
    """The layer followed by y * gain + offset per channel (float64 (C,), gain > 0); codes stay what they are.

    s_w' = s_w gain,  b' = b gain + offset (on the new accumulator grid, s_x s_w'). Where the code of b' would leave int32, s_w'
    is larger: the weights of such a channel hardly move its output.

    Args:
        input_scale: s_x, a scalar; derived from the layer where it is not given, up to a rounding error.
    """
    if isinstance(layer, WeightedLayer):
        return folded(layer, gain, offset)
    bias = layer.real_bias.double() * gain + offset
    scale = (layer.scale.double() * per_channel(gain, layer.scale)).to(layer.scale.dtype).clamp(min=SMALLEST_SCALE)
    if layer.bias_scale is not None and input_scale is None:
        input_scale = layer.bias_scale[0] / layer.scale[0]
    on_grid = None if layer.bias_scale is None else input_scale
    return QuantizedLayer.from_real(layer.geometry, layer.codes, scale, bias, on_grid, bits=layer.bits)


def para_normalize(
    module: fx.GraphModule,
    targets: Mapping[str, ChannelStatistics],
    batches: list[Batch],
    store: Store,
    on_layer: Callable[[str], None] = lambda name: None,
    *,
    strength: float = 1.0,
    on_outputs: Callable[[Iterator[list[Any]]], None] | None = None,
    masks: Sequence[Tensor | None] = (),
) -> None:
    """Puts, in place, the channel statistics of every layer in `targets` back to their target.

    Layer by layer, each measured behind the already corrected prefix. Codes are untouched.

    Args:
        module: a captured network or a quantized one's operators.
        targets: the float network's statistics by layer name.
        batches: the inputs that the targets were measured on.
        strength: power of the gains; below 1 variances go a part of the way.
        on_outputs: called with the corrected network's outputs on each batch.
        masks: per batch, the tokens that are no padding; empty where nothing is padded.
    """
    called = [node for node in module.graph.nodes if node.op == "call_module"]  # an argument may have a layer's name
    names = {node: str(node.target) for node in called if str(node.target) in targets}
    execution = Execution(module, batches, store)
    for node in module.graph.nodes:
        if node.op == "output":
            if on_outputs is not None:
                on_outputs(execution.outputs(node))
            break
        if node not in names:
            execution.step(node)
        else:
            layer = module.get_submodule(names[node])
            assert isinstance(layer, (QuantizedLayer, WeightedLayer))
            raw = InPieces(layer.alone()) if isinstance(layer, QuantizedLayer) else layer
            execution.put(node, execution.compute(node, raw))
            outputs = real_tokens(execution.values(node), masks or [None] * len(batches))
            now = ChannelStatistics.of(outputs, layer.geometry)
            gain, offset = correction(now, targets[names[node]], strength)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            grid = grid_of(module, source)
            corrected = absorb(layer, gain, offset, None if grid is None else grid.scale)
            module.set_submodule(names[node], corrected)
            execution.put(node, _moved(execution.values(node), layer, corrected, gain))
            on_layer(names[node])
        execution.release(node)
    link_requantization(module)


def _moved(values: Iterable[Tensor], layer: Rescalable, corrected: Rescalable, gain: Tensor) -> Iterator[Tensor]:
    """The outputs of the corrected layer from those of the layer, whose bias was not on the same accumulator grid."""
    offset = _real_bias(corrected).double() - _real_bias(layer).double() * gain

    def moved(value: Tensor) -> Tensor:
        factor, shift = (layer.geometry.along_channels(part.to(value.dtype)) for part in (gain, offset))
        return torch.addcmul(shift, value, factor)

    return map(moved, values)


def _real_bias(layer: Rescalable) -> Tensor:
    return layer.real_bias if isinstance(layer, QuantizedLayer) else layer.bias


def correction(now: ChannelStatistics, target: ChannelStatistics, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """(gain, offset) per channel that moves the statistics from `now` to `target`; the gain is bounded to GAIN_LIMITS.

    Args:
        strength: power of the gain.
    """
    gain = (target.variance / now.variance.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().clamp(
        *GAIN_LIMITS
    ) ** strength
    gain = torch.where(target.variance > 0, gain, torch.ones_like(gain))
    return gain, target.mean - gain * now.mean
