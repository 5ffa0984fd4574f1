"""Rounding that gradients pass straight through, as fused functions: one pass over memory forward, one or two backward.

Hubara et al. 2021, section 3: straight through the rounding, zero outside the clip for x; scale and zero point learn through
the rounding as in LSQ (Esser et al., 1902.08153). `calque.grid.arithmetic.learned_fake_quantize` is the same in plain operators.
"""

from typing import Any

import torch
from torch import Tensor

from calque.grid.arithmetic import round_through


class _Learned(torch.autograd.Function):
    """`fake_quantize` with gradients for x, the scale and the offset `low` of the lower end.

    With y the result and g its gradient, d y / d scale = (y - x) / scale inside the clip and y / scale outside it: two scalar
    products of what other operators keep anyway. The ends are numbers, and the gradient is masked by that of a clip: kernels
    with tensors in these places take several times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ends = (low.item(), high.item())
        y = x.div(scale).round_().clamp_(*ends).mul_(scale)
        ctx.ends = ends
        ctx.save_for_backward(x, y if ctx.needs_input_grad[1] else None, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, y, scale = ctx.saved_tensors
        step, (low, high) = scale.item(), ctx.ends
        # what rounds to an end is inside
        inside = torch.ops.aten.hardtanh_backward(gradients[0], x, (low - 0.5) * step, (high + 0.5) * step)
        pulled = (_product(gradients[0], y) - _product(inside, x)) / scale if ctx.needs_input_grad[1] else None
        # both ends move with the zero point: one of them takes the whole gradient
        moved = scale * (gradients[0].sum() - inside.sum()) if ctx.needs_input_grad[2] else None
        return inside, pulled, moved, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of two tensors of one shape; fast where they lie in memory alike."""
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


class _Weights(torch.autograd.Function):
    """clamp(round(levels)) * scale with gradients for the levels (zero outside the clip) and for the scale."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        codes = levels.round()
        inside = (codes >= low) & (codes <= high)
        codes.clamp_(low, high)
        ctx.save_for_backward(codes, inside, scale)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        codes, inside, scale = ctx.saved_tensors
        return (gradients[0] * scale).mul_(inside), (gradients[0] * codes).sum_to_size(scale.shape), None, None


def quantize_through(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`fake_quantize` whose gradient for x is 1 inside the clip and 0 outside; scale and zero point get none.

    >>> x = torch.tensor([0.2, 5.0], requires_grad=True)
    >>> y = quantize_through(x, torch.tensor(0.5), torch.tensor(0), 0, 3)
    >>> torch.autograd.grad(y.sum(), x)[0]
    tensor([1., 0.])
    """
    y: Tensor = _Learned.apply(x, scale, qmin - zero_point, qmax - zero_point)  # type: ignore[no-untyped-call]
    return y


def learn_through(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`fake_quantize` with gradients for x (zero outside the clip), the scale and a real zero point, all scalars.

    >>> scale = torch.tensor(0.5, requires_grad=True)
    >>> y = learn_through(torch.tensor([0.2, 5.0]), scale, torch.tensor(0.0), 0, 3)
    >>> torch.autograd.grad(y.sum(), scale)[0]  # (0 - 0.2) / 0.5 inside, 3 outside
    tensor(2.6000)
    """
    offset = round_through(zero_point)
    y: Tensor = _Learned.apply(x, scale, qmin - offset, (qmax - offset).detach())  # type: ignore[no-untyped-call]
    return y


def weights_through(levels: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
    """Weights on their grid, with gradients for their real levels and for the scale that broadcasts against them.

    >>> levels = torch.tensor([[0.6, 9.0]], requires_grad=True)
    >>> w = weights_through(levels, torch.tensor([[0.5]]), (-8, 7))
    >>> w, torch.autograd.grad(w.sum(), levels)[0]
    (tensor([[0.5000, 3.5000]], grad_fn=<_WeightsBackward>), tensor([[0.5000, 0.0000]]))
    """
    w: Tensor = _Weights.apply(levels, scale, *limits)  # type: ignore[no-untyped-call]
    return w
