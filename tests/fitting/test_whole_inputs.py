"""Whole inputs for a fit: which are drawn, and what the layer makes of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calque.fitting.problem import layer_problem
from calque.fitting.whole_inputs import INPUTS, whole_inputs
from calque.network import Geometry

LINEAR = Geometry("linear")
SHAPE = torch.Size([1, 1])


def numbered(sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of inputs (n, 1) that know their number, and outputs ten times as large."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    inputs = [torch.arange(float(s), s + n)[:, None] for s, n in zip(starts, sizes, strict=True)]
    return inputs, [10 * x for x in inputs]


def drawn(sizes: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs, outputs = numbered(sizes)
    draw, _ = whole_inputs(LINEAR, SHAPE, sizes, lambda index: (inputs[index], outputs[index]))
    return draw(torch.Generator().manual_seed(seed))


def held_out_by_the_problem(sizes: list[int]) -> set[int]:
    """The inputs whose rows judge the iterates, as the sampled problem of the same layer has them."""
    inputs, outputs = numbered(sizes)
    problem = layer_problem(
        LINEAR, torch.ones(1, 1), torch.zeros(1), lambda x: x, zip(inputs, outputs, strict=True),
        inputs=sum(sizes), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return {int(value) for value in problem.patches[0, problem.held_out, 0]}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_only_fitted_inputs_are_drawn_each_once_with_its_output(sizes: list[int], seed: int) -> None:
    x, y = drawn(sizes, seed)

    total = sum(sizes)
    fitted = 1 if total == 1 else total - max(1, total // 5)
    numbers = x.flatten().tolist()
    assert len(set(numbers)) == len(numbers) == min(INPUTS, fitted)
    assert max(numbers) < fitted
    assert torch.equal(y, 10 * x)
    if total > 1:
        assert not set(map(int, numbers)) & held_out_by_the_problem(sizes)


def test_every_fitted_input_is_drawn_sooner_or_later() -> None:
    sizes = [30, 50, 20]
    seen = {number for seed in range(40) for number in drawn(sizes, seed)[0].flatten().tolist()}

    assert seen == set(range(80))


def test_the_same_generator_draws_the_same() -> None:
    assert torch.equal(drawn([60, 60], 3)[0], drawn([60, 60], 3)[0])
    assert not torch.equal(drawn([60, 60], 3)[0], drawn([60, 60], 4)[0])


def test_inputs_of_one_size_alone_are_in_a_step() -> None:
    inputs = [torch.zeros(20, 1, 8, 8), torch.ones(20, 1, 10, 10), torch.zeros(20, 1, 8, 8)]
    draw, _ = whole_inputs(
        Geometry("convolution"), torch.Size([1, 1, 1, 1]), [20] * 3, lambda index: (inputs[index], inputs[index])
    )

    for seed in range(5):
        x, y = draw(torch.Generator().manual_seed(seed))
        assert x.shape == y.shape
        assert len(torch.unique(x)) == 1
        assert 1 <= len(x) <= 48


@pytest.mark.parametrize("groups", [1, 2])
def test_the_layer_of_whole_inputs_is_the_convolution(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 4 // groups, 3, 3, generator=generator), torch.randn(4, generator=generator)
    x = torch.randn(5, 4, 7, 7, generator=generator)
    geometry = Geometry("convolution", (2, 2), (1, 1, 1, 1), (1, 1), groups)
    _, linear = whole_inputs(geometry, weight.shape, [5], lambda index: (x, x))

    received = linear(x, geometry.grouped(weight), bias.reshape(groups, 1, -1))

    assert torch.equal(received, F.conv2d(x, weight, bias, 2, 1, 1, groups))
