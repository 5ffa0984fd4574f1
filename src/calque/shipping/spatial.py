"""Pools and resizes whose ONNX twin, or whose kernel in ONNX Runtime, computes something else: written with other operators.

Average pools: ONNX has no `divisor_override`, and ONNX Runtime's integer kernel divides by whole windows where `ceil_mode` lets
them reach over the edge, unless padding is not counted. Adaptive pools: torch.onnx writes the windows of the traced size.
Cubic resizes: ONNX Runtime moves axes through them, and its kernel then refuses to shrink. Antialiased resizes: torch.onnx
drops the scale factors, by which PyTorch places its samples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, fx

from calque.errors import ExportError
from calque.network.network import is_symbolic, value_of

aten = torch.ops.aten

_AVERAGE: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_AVERAGES = frozenset({aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default})
_ADAPTIVE_AVERAGES = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
_ADAPTIVE_MAXIMA = {
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}


def write_exactly(graph: fx.Graph, place: Callable[[fx.Node], str]) -> None:
    """Replaces, in place, the operators that a file would compute otherwise.

    Args:
        place: where a node stands, in words.

    Raises:
        ExportError: the places of an adaptive max pool that torch.onnx cannot write are read.
    """
    for node in graph.nodes:
        if node.target in _AVERAGES:
            _average(node)
        elif node.target in _ADAPTIVE_AVERAGES:
            if _is_free(node, _ADAPTIVE_AVERAGES[node.target]):
                node.target = adaptive_average
        elif node.target in _ADAPTIVE_MAXIMA:
            _adaptive_maximum(node, place)
        elif node.target is aten.upsample_bicubic2d.vec:
            node.target = bicubic


def _average(node: fx.Node) -> None:
    options = _arguments(node)
    divisor, ceil, counted = (options.get(name) for name in ("divisor_override", "ceil_mode", "count_include_pad"))
    kernel, padding = _listed(options["kernel_size"]), _listed(options["padding"])
    stride = _listed(options["stride"]) or kernel
    if divisor is not None:
        node.target, node.args = weighted_average, (node.args[0], kernel, stride, padding, bool(ceil), divisor)
    elif ceil and counted and any(padding):
        node.target, node.args = clipped_average, (node.args[0], kernel, stride, padding)
    elif ceil and counted:  # nothing is padded, so nothing changes but the kernel that ONNX Runtime takes
        node.args = (node.args[0], kernel, stride, padding, True, False)
    else:
        return
    node.kwargs = {}


def _adaptive_maximum(node: fx.Node, place: Callable[[fx.Node], str]) -> None:
    dims = _ADAPTIVE_MAXIMA[node.target]  # type: ignore[index]
    if not (_is_free(node, dims) or _is_uneven(node, dims)):
        return
    if any(reader.args[1:] != (0,) for reader in node.users):
        raise ExportError(
            f"{node.target} ({place(node)}) cannot be written with its indices, which the network reads: where the sizes "
            "are free, or are no multiples of the output's, ONNX has none. Read the values alone, or pool with max_pool2d."
        )
    node.target = adaptive_maximum


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _sizes(node: fx.Node, dims: int) -> list[tuple[Any, Any]]:
    """(size, places) of each pooled axis."""
    value = value_of(node.args[0])
    assert value is not None
    places = _listed(node.args[1])
    return list(zip(value.shape[-dims:], places * dims if len(places) == 1 else places, strict=True))


def _is_free(node: fx.Node, dims: int) -> bool:
    """Whether an axis of free size is pooled to more than one place."""
    return any(is_symbolic(size) and places != 1 for size, places in _sizes(node, dims))


def _is_uneven(node: fx.Node, dims: int) -> bool:
    return any(places != 1 and size % places for size, places in _sizes(node, dims))


def weighted_average(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool, divisor: int
) -> Tensor:
    """The sums of the windows over `divisor`: an average of zero-padded windows, all of the same size, times a constant."""
    pads: list[int] = []
    for k, s, p in zip(reversed(kernel), reversed(stride), reversed(padding), strict=True):
        # with ceil_mode the last window may start as late as the last value, and end behind the padding
        pads += [p, min(p + s - 1, k - 1) if ceil else p]
    pool = _AVERAGE[len(kernel) - 1]
    return pool(F.pad(x, pads), kernel, stride) * (math.prod(kernel) / divisor)


def clipped_average(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """An average pool with ceil_mode that counts its padding: averages of what is there, times the share of that."""
    pool = _AVERAGE[len(kernel) - 1]
    share = pool(torch.ones_like(x[:1]), kernel, stride, padding, True, True)
    return pool(x, kernel, stride, padding, True, False) * share


def _windows(size: int, places: int, device: torch.device) -> Tensor:
    """Which values the windows of an adaptive pool have, bool (places, size)."""
    index, position = torch.arange(places, device=device)[:, None], torch.arange(size, device=device)
    start = torch.div(index * size, places, rounding_mode="floor")
    end = torch.div((index + 1) * size + (places - 1), places, rounding_mode="floor")
    return (position >= start) & (position < end)


def adaptive_average(x: Tensor, places: Sequence[int]) -> Tensor:
    """An adaptive average pool as products with a matrix for each axis, made from the sizes at hand."""
    for axis, count in zip(range(-len(places), 0), places, strict=True):
        inside = _windows(x.shape[axis], count, x.device).to(x.dtype)
        share = inside / inside.sum(1, keepdim=True)
        x = (x.movedim(axis, -1) @ share.T).movedim(-1, axis)
    return x


def adaptive_maximum(x: Tensor, places: Sequence[int]) -> tuple[Tensor, None]:
    """The values of an adaptive max pool, axis by axis; no indices."""
    for axis, count in zip(range(-len(places), 0), places, strict=True):
        inside = _windows(x.shape[axis], count, x.device)
        values = x.movedim(axis, -1).unsqueeze(-2)  # (..., 1, size)
        x = values.masked_fill(~inside, -math.inf).amax(-1).movedim(-1, axis)
    return x, None


def bicubic(
    x: Tensor, size: Sequence[int] | None, align_corners: bool, scale_factors: Sequence[float] | None
) -> Tensor:
    """A cubic resize of all images as channels of one: through a Reshape ONNX Runtime moves no axes."""
    channels = x.reshape(1, -1, x.shape[-2], x.shape[-1])
    resized = aten.upsample_bicubic2d.vec(channels, size, align_corners, scale_factors)
    return resized.reshape(x.shape[0], x.shape[1], resized.shape[-2], resized.shape[-1])  # type: ignore[no-any-return]


def _resize(x, output_size, align_corners: bool, scales, **options):  # type: ignore[no-untyped-def]
    """An antialiased resize; by its scale factors where it has them."""
    op: Any = onnxscript.opset21
    transform = "align_corners" if align_corners else "half_pixel"
    common = {"coordinate_transformation_mode": transform, "antialias": 1, "exclude_outside": 1, **options}
    if None in scales:
        leading = op.Shape(x, start=0, end=2)
        return op.Resize(
            x, None, None, op.Concat(leading, op.Cast(output_size, to=TensorProto.INT64), axis=0), **common
        )
    return op.Resize(x, None, op.Constant(value_floats=[1.0, 1.0, *scales]), None, **common)


def _translate_bilinear(x, output_size, align_corners: bool, scales_h=None, scales_w=None):  # type: ignore[no-untyped-def]
    return _resize(x, output_size, align_corners, (scales_h, scales_w), mode="linear")


def _translate_bicubic(x, output_size, align_corners: bool, scales_h=None, scales_w=None):  # type: ignore[no-untyped-def]
    return _resize(x, output_size, align_corners, (scales_h, scales_w), mode="cubic", cubic_coeff_a=-0.5)


RESIZES: dict[Callable[..., Any], Callable[..., Any]] = {
    aten._upsample_bilinear2d_aa.default: _translate_bilinear,
    aten._upsample_bicubic2d_aa.default: _translate_bicubic,
}
