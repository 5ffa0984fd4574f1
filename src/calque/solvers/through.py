"""Rounding that gradients pass straight through, as fused functions: one pass over memory forward, one or two backward.

Hubara et al. 2021, section 3: straight through the rounding, zero outside the clip for x; scale and zero point learn through
the rounding as in LSQ (Esser et al., 1902.08153). `calque.arithmetic.learned_fake_quantize` is the same in plain operators.
"""

from typing import Any

import torch
from torch import Tensor

from calque.arithmetic import round_through


class _Through(torch.autograd.Function):
    """`fake_quantize` with a gradient for x alone; it keeps one byte per value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        levels = x.div(scale).round_()
        ctx.save_for_backward((levels >= low) & (levels <= high))
        return levels.clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class _Learned(torch.autograd.Function):
    """`fake_quantize` with gradients for x, the scale and the offsets low and high of the ends.

    With y the result and g its gradient, inside the clip d y / d scale = (y - x) / scale and outside it y / scale: two scalar
    products of what is kept for other operators anyway. Outside, y = scale * end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        levels = x.div(scale).round_()
        inside = (levels >= low) & (levels <= high)
        y = levels.clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, y, inside, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, y, inside, scale = ctx.saved_tensors
        passed = gradients[0] * inside
        pulled = (_product(gradients[0], y) - _product(passed, x)) / scale
        if not ctx.needs_input_grad[2]:
            return passed, pulled, None, None
        # both ends move alike with the zero point: one of them takes the whole gradient
        return passed, pulled, scale * (gradients[0].sum() - passed.sum()), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of two tensors of one shape."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
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
        rest = tuple(range(1, codes.dim()))
        return (gradients[0] * scale).mul_(inside), (gradients[0] * codes).sum(rest, keepdim=True), None, None


def quantize_through(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`fake_quantize` whose gradient for x is 1 inside the clip and 0 outside; scale and zero point get none.

    >>> x = torch.tensor([0.2, 5.0], requires_grad=True)
    >>> y = quantize_through(x, torch.tensor(0.5), torch.tensor(0), 0, 3)
    >>> torch.autograd.grad(y.sum(), x)[0]
    tensor([1., 0.])
    """
    low, high = (qmin - zero_point).to(x.dtype), (qmax - zero_point).to(x.dtype)
    y: Tensor = _Through.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
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
    """Weights on their grid, with gradients for their real levels and for the scale that broadcasts along axis 0.

    >>> levels = torch.tensor([[0.6, 9.0]], requires_grad=True)
    >>> w = weights_through(levels, torch.tensor([[0.5]]), (-8, 7))
    >>> w, torch.autograd.grad(w.sum(), levels)[0]
    (tensor([[0.5000, 3.5000]], grad_fn=<_WeightsBackward>), tensor([[0.5000, 0.0000]]))
    """
    w: Tensor = _Weights.apply(levels, scale, *limits)  # type: ignore[no-untyped-call]
    return w
