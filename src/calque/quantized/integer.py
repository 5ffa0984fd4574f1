"""The exact integer evaluation of a quantized network: what integer kernels compute, settled without rounding errors.

Codes times codes are accumulated exactly, the int32 bias is added, and one float32 factor per channel leads to the next
grid (METHOD section 1). Operators that only move values work on codes. Adds, pools and products of codes are those of
`calque.quantized.kernels`, rounded as ONNX Runtime rounds them. Everything that has no integer kernel runs in float32 on
real values.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calque.grid.arithmetic import EXACT_FLOAT32, quantize
from calque.network.network import clamp_bounds, is_movement
from calque.quantized.calls import CallForm
from calque.quantized.kernels import UNBOUNDED, Bounds, fuse, settle
from calque.quantized.modules import QuantizedLayer, Quantizer, Settled

aten = torch.ops.aten


@dataclass(frozen=True)
class OnGrid:
    """A tensor on an affine grid: `offsets` are codes minus the zero point, whole numbers in float32."""

    offsets: Tensor
    grid: Quantizer

    def real(self) -> Tensor:
        return self.offsets * self.grid.scale

    def codes(self) -> Tensor:
        return (self.offsets + self.grid.zero_point).to(torch.uint8)


@dataclass(frozen=True)
class Accumulator:
    """A layer's exact int32 sums; `scale` (broadcast) is s_x * s_w; `bounds` clip the real value."""

    sums: Tensor
    scale: Tensor
    bounds: Bounds = UNBOUNDED

    def real(self) -> Tensor:
        return (self.sums.float() * self.scale).clamp(*self.bounds)

    def onto(self, grid: Quantizer, bounds: Bounds) -> OnGrid:
        return OnGrid(grid.requantize(self.sums, self.scale / grid.scale, bounds), grid)


Exact = OnGrid | Accumulator


class IntegerModel(nn.Module):
    """A quantized network evaluated over integers, with the original's signature.

    `forward` returns what the network returns; `trace` also returns the codes of every edge.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        form: CallForm,
        out_spec: pytree.TreeSpec,
        edges: Mapping[str, str],
    ):
        super().__init__()
        self.graph_module = graph_module
        self.kernels = fuse(graph_module)
        self.form = form
        self.out_spec = out_spec
        self.edges = dict(edges)

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> Any:
        leaves = self.form.leaves(args, kwargs)
        outputs = _Interpreter(self.graph_module, self.kernels, self.edges).run(*leaves)
        return pytree.tree_unflatten(outputs, self.out_spec)

    @torch.no_grad()
    def trace(self, *leaves: object) -> tuple[tuple[Tensor, ...], dict[str, Tensor], tuple[Tensor | None, ...]]:
        """For flat inputs: the flat outputs, the uint8 codes of every edge by name, and the step of each output.

        The step (broadcasts against the output) is that of its grid, or of the accumulator behind it; None where it has neither.
        """
        interpreter = _Interpreter(self.graph_module, self.kernels, self.edges)
        outputs = interpreter.run(*leaves)
        return outputs, interpreter.codes, tuple(map(_step, interpreter.last))


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, kernels: fx.Graph, edges: Mapping[str, str]):
        super().__init__(module, graph=kernels)
        self.edges = edges
        self.codes: dict[str, Tensor] = {}
        self.last: tuple[object, ...] = ()  # the outputs before they became real numbers

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            return self._module(n, args[0])
        if n.op == "call_function":
            exact = self._exact(n, args, kwargs)
            if exact is not None:
                return exact
        if n.op == "output":
            self.last = args[0]
        if n.op in ("call_function", "output"):
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda value: cast("Any", _real(value)))
        return getattr(self, n.op)(STABLE.get(n.target, n.target), args, kwargs)

    def _module(self, node: fx.Node, x: object) -> object:
        module = (
            self.submodules[node.target] if hasattr(self, "submodules") else self.module.get_submodule(str(node.target))
        )
        if isinstance(module, Quantizer):
            on_grid = _put_on_grid(x, module)
            name = self.edges.get(str(node.target))
            if name is not None:
                self.codes.setdefault(name, on_grid.codes())
            return on_grid
        if isinstance(module, QuantizedLayer) and isinstance(x, OnGrid) and module.bias_scale is not None:
            return accumulate(module, x)  # weights alone on integers compute on real inputs, whatever these are on
        return module(_real(x))

    def _exact(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """The result on integers, or None where the operator has none."""
        first = args[0] if args else None
        if node.target is operator.getitem and isinstance(first, (list, tuple)):
            return first[args[1]]
        if isinstance(first, OnGrid) and is_movement(node):
            assert callable(node.target)
            moved = node.target(first.offsets, *args[1:], **kwargs)
            return pytree.tree_map(lambda offsets: OnGrid(offsets, first.grid), moved)
        if not isinstance(first, Accumulator):
            return None
        if node.target is settle:
            _, _, grid, limits = args
            return first.onto(grid, limits)
        bounds = clamp_bounds(node)
        if bounds is None:
            return None
        low, high = (min(max(end, bounds[0]), bounds[1]) for end in first.bounds)
        return replace(first, bounds=(low, high))


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Tensor]:
    """The k largest or smallest values, in order, and where they are; of equal ones the first, as ONNX has it."""
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return [values.narrow(dim, 0, k), indices.narrow(dim, 0, k)]


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> list[Tensor]:
    return list(torch.sort(x, dim=dim, descending=descending, stable=True))


STABLE: dict[object, Callable[..., list[Tensor]]] = {aten.topk.default: _topk, aten.sort.default: _sort}


def _real(value: object) -> object:
    return value.real() if isinstance(value, Exact) else value


def _step(value: object) -> Tensor | None:
    if isinstance(value, OnGrid):
        return value.grid.scale
    return value.scale if isinstance(value, Accumulator) else None


def _put_on_grid(x: object, grid: Quantizer) -> OnGrid:
    if isinstance(x, OnGrid) and x.grid is grid:
        return x
    if isinstance(x, Settled):
        return OnGrid(grid.offsets(x.values), grid)
    real = _real(x)
    assert isinstance(real, Tensor)
    codes = quantize(real, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    return OnGrid(codes.sub_(grid.zero_point), grid)


def accumulate(layer: QuantizedLayer, x: OnGrid) -> Accumulator:
    """The layer's exact sums; float64 where float32 could round one of its partial sums."""
    codes = layer.codes.float()
    largest = codes.abs().flatten(1).sum(1).max().item() * 255
    dtype = torch.float32 if largest < EXACT_FLOAT32 else torch.float64
    sums = layer.geometry.apply(x.offsets.to(dtype), codes.to(dtype), None).to(torch.int32)
    bias = layer.geometry.along_channels(layer.bias)
    return Accumulator(sums.add_(bias), layer.geometry.along_channels(x.grid.scale * layer.scale))
