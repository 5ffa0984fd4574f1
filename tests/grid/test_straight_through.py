import pytest
import torch
from torch import Tensor

from calque.grid.arithmetic import fake_quantize, learned_fake_quantize, round_through
from calque.grid.straight_through import learn_through, weights_through

# Away from rounding edges, where the two may take different sides.
VALUES = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
PULL = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("zero_point", [0.0, 3.0, 2.6])
def test_values_and_gradients_are_those_of_the_plain_operators(zero_point: float, form: torch.memory_format) -> None:
    def run(quantize: object, x: Tensor) -> tuple[Tensor, ...]:
        scale, zero = torch.tensor(0.37, requires_grad=True), torch.tensor(zero_point, requires_grad=True)
        y: Tensor = quantize(x, scale, zero, 0, 7)  # type: ignore[operator]
        return (y, *torch.autograd.grad(y, [x, scale, zero], PULL))

    fused = run(learn_through, VALUES.to(memory_format=form).requires_grad_())
    plain = run(learned_fake_quantize, VALUES.clone().requires_grad_())

    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_forward_pass_is_bit_for_bit_the_quantizer() -> None:
    scale, zero_point = torch.tensor(0.37), torch.tensor(3)

    assert torch.equal(
        learn_through(VALUES, scale, zero_point.float(), 0, 7), fake_quantize(VALUES, scale, zero_point, 0, 7)
    )


def test_layouts_that_differ_give_the_same_gradient_of_the_scale() -> None:
    scale = torch.tensor(0.37, requires_grad=True)
    x = VALUES.transpose(1, 3).requires_grad_()

    (found,) = torch.autograd.grad(learn_through(x, scale, torch.tensor(0.0), 0, 7), scale, PULL.transpose(1, 3))
    (expected,) = torch.autograd.grad(learn_through(VALUES, scale, torch.tensor(0.0), 0, 7), scale, PULL)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_have_the_gradients_of_the_plain_operators() -> None:
    def plain(levels: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
        return torch.clamp(round_through(levels), *limits) * scale

    results = []
    for function in (weights_through, plain):
        levels = (3 * VALUES).requires_grad_()  # some outside the grid
        scale = torch.linspace(0.1, 0.4, 4).reshape(4, 1, 1, 1).requires_grad_()
        w = function(levels, scale, (-4, 3))
        results.append((w, *torch.autograd.grad(w, [levels, scale], PULL)))

    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
