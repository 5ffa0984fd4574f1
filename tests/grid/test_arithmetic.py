import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from calque.grid.arithmetic import (
    BIAS_LIMIT,
    SMALLEST_SCALE,
    Grids,
    activation_limits,
    affine_grid,
    bias_codes,
    dequantize,
    fake_quantize,
    learned_fake_quantize,
    pack,
    quantize,
    requantize,
    requantize_sum,
    round_through,
    unpack,
    weight_codes,
    weight_limits,
)

BITS = st.integers(2, 8)
REALS = st.floats(-1e4, 1e4, width=32)
SCALES = st.floats(float(np.float32(1e-3)), float(np.float32(1e2)), width=32)
FEW = settings(max_examples=60, deadline=None)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """(scale, zero point, qmin, qmax) of a valid activation grid."""
    bits = draw(BITS)
    qmin, qmax = activation_limits(bits)
    return (
        torch.tensor(draw(SCALES)),
        torch.tensor(draw(st.integers(qmin, qmax)), dtype=torch.int32),
        qmin,
        qmax,
    )


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


Grid = tuple[Tensor, Tensor, int, int]


@given(grids())
@FEW
def test_zero_is_preserved_by_every_grid(grid: Grid) -> None:
    assert fake_quantize(tensor([0.0, -0.0]), *grid).eq(0).all()


@given(st.lists(REALS, min_size=1, max_size=20), grids())
@FEW
def test_quantizing_twice_is_quantizing_once(values: list[float], grid: Grid) -> None:
    once = fake_quantize(tensor(values), *grid)

    assert torch.equal(fake_quantize(once, *grid), once)


@given(st.lists(REALS | st.sampled_from([float("inf"), float("-inf")]), min_size=1, max_size=20), grids())
@FEW
def test_codes_are_whole_numbers_in_range(values: list[float], grid: Grid) -> None:
    codes = quantize(tensor(values), *grid)

    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid[2]
    assert codes.max() <= grid[3]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), grids())
@FEW
def test_the_error_inside_the_range_is_at_most_half_a_step(fractions: list[float], grid: Grid) -> None:
    scale, zero_point, qmin, qmax = grid
    low, high = (qmin - zero_point) * scale, (qmax - zero_point) * scale
    x = low + tensor(fractions) * (high - low)

    error = (x - fake_quantize(x, *grid)).abs()

    rounding = 4 * torch.finfo(torch.float32).eps * (high - low)  # of x itself, and of the two products
    assert error.max() <= scale / 2 + rounding


@given(st.lists(REALS, min_size=2, max_size=20), grids())
@FEW
def test_quantizing_is_monotone(values: list[float], grid: Grid) -> None:
    x = tensor(sorted(values))

    assert fake_quantize(x, *grid).diff().min() >= 0


@given(st.lists(REALS, min_size=1, max_size=12), grids())
@FEW
def test_codes_and_values_equal_the_oracle_bit_for_bit(values: list[float], grid: Grid) -> None:
    scale, zero_point, qmin, qmax = grid
    x = np.array(values, np.float32)

    codes = oracles.quantize(x, scale.item(), int(zero_point), qmin, qmax)

    assert np.array_equal(quantize(torch.from_numpy(x), *grid).numpy(), codes)
    expected = oracles.dequantize(codes, scale.item(), int(zero_point))
    assert np.array_equal(dequantize(quantize(torch.from_numpy(x), *grid), scale, zero_point).numpy(), expected)
    assert np.array_equal(fake_quantize(torch.from_numpy(x), *grid).numpy(), expected)


@given(st.lists(REALS, min_size=1, max_size=12), grids(), st.integers(-8, 8))
@FEW
def test_scaling_input_and_scale_together_changes_no_code(values: list[float], grid: Grid, power: int) -> None:
    scale, zero_point, qmin, qmax = grid

    scaled = quantize(tensor(values) * 2.0**power, scale * 2.0**power, zero_point, qmin, qmax)

    assert torch.equal(scaled, quantize(tensor(values), scale, zero_point, qmin, qmax))


def test_halves_round_to_even() -> None:
    x = tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])

    codes = quantize(x, torch.tensor(1.0), torch.tensor(8), 0, 15)

    assert codes.tolist() == [6, 6, 8, 8, 10, 10]


def test_the_input_is_divided_by_the_scale_not_multiplied_by_its_reciprocal() -> None:
    """The two differ next to halves only: inputs that part are searched there."""
    scale = np.float32(0.3)
    halves = (np.arange(1, 2000, dtype=np.float32) + np.float32(0.5)) * scale
    parted = halves[np.rint(halves / scale) != np.rint(halves * (np.float32(1) / scale))]
    assert len(parted) > 0

    codes = quantize(torch.from_numpy(parted), torch.tensor(0.3), torch.tensor(0), 0, 10**6)

    assert np.array_equal(codes.numpy(), np.rint(parted / scale))


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), grids())
@FEW
def test_torch_agrees_away_from_rounding_edges(values: list[float], grid: Grid) -> None:
    scale, zero_point, qmin, qmax = grid
    x = tensor(values)
    fraction = (x / scale).abs().frac()
    x = x[((fraction - 0.5).abs() > 1e-3)]  # torch multiplies by the reciprocal, which moves the edges

    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)

    assert torch.equal(fake_quantize(x, *grid), theirs)


def test_quantizing_leaves_its_argument_alone() -> None:
    x = tensor([0.3, 9.9])

    quantize(x, torch.tensor(1.0), torch.tensor(0), 0, 3)
    fake_quantize(x, torch.tensor(1.0), torch.tensor(0), 0, 3)

    assert torch.equal(x, tensor([0.3, 9.9]))


@given(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32), BITS)
@FEW
def test_a_grid_over_a_range_covers_it_and_zero(first: float, second: float, bits: int) -> None:
    low, high = min(first, second), max(first, second)
    scale, zero_point = affine_grid(torch.tensor(low), torch.tensor(high), bits)

    ends = tensor([low, high, 0.0])
    qmin, qmax = activation_limits(bits)
    error = (fake_quantize(ends, scale, zero_point, qmin, qmax) - ends).abs()

    assert qmin <= zero_point <= qmax
    assert error.max() <= scale * (0.5 + 1e-3)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (-5.0, 0.0), (2.0, 3.0), (-3.0, -1.0)])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_grid_equals_the_oracle(low: float, high: float, bits: int) -> None:
    scale, zero_point = affine_grid(torch.tensor(low), torch.tensor(high), bits)

    expected_scale, expected_zero_point = oracles.grid(low, high, bits)
    assert scale.item() == pytest.approx(expected_scale, rel=1e-6)
    assert zero_point.item() == expected_zero_point


def test_an_empty_range_is_taken_for_zero_to_one() -> None:
    scale, zero_point = affine_grid(torch.tensor(0.0), torch.tensor(0.0), 8)

    assert scale.item() == pytest.approx(1 / 255)
    assert zero_point == 0


def test_a_grid_of_the_smallest_numbers_has_a_normal_scale() -> None:
    scale, _ = affine_grid(torch.tensor(0.0), torch.tensor(1e-37), 8)

    assert scale.item() == SMALLEST_SCALE


@given(st.data(), BITS, st.integers(0, 67))
@FEW
def test_packed_codes_come_back(data: st.DataObject, bits: int, count: int) -> None:
    qmin, qmax = weight_limits(bits)
    codes = data.draw(st.lists(st.integers(qmin, qmax), min_size=count, max_size=count))

    packed = pack(torch.tensor(codes, dtype=torch.int8), bits)

    assert packed.numpy().tobytes() == oracles.pack(codes, bits)
    assert unpack(packed, bits, (count,)).tolist() == codes


def test_packing_keeps_the_shape_that_is_asked_for() -> None:
    codes = torch.arange(-4, 4, dtype=torch.int8).repeat(3).reshape(2, 3, 4)

    assert torch.equal(unpack(pack(codes, 3), 3, (2, 3, 4)), codes)


@given(st.lists(REALS, min_size=6, max_size=6), st.lists(SCALES, min_size=2, max_size=2), BITS)
@FEW
def test_weight_codes_equal_the_oracle_channel_by_channel(values: list[float], scales: list[float], bits: int) -> None:
    weight = tensor(values).reshape(2, 3)

    codes = weight_codes(weight, tensor(scales), bits)

    assert codes.dtype == torch.int8
    for row in range(2):
        expected = oracles.quantize(weight[row].numpy(), scales[row], 0, *weight_limits(bits))
        assert np.array_equal(codes[row].numpy(), expected)


@given(st.floats(-1e3, 1e3, width=32), SCALES)
@FEW
def test_bias_codes_equal_the_oracle(bias: float, scale: float) -> None:
    codes = bias_codes(tensor([bias]), tensor([scale]))

    assert codes.dtype == torch.int32
    assert codes.item() == oracles.bias_code(bias, scale)


def test_a_bias_code_leaves_half_of_int32_to_the_accumulator() -> None:
    codes = bias_codes(tensor([1e9, -1e9]), tensor([1e-3, 1e-3]))

    assert codes.tolist() == [BIAS_LIMIT, -BIAS_LIMIT]


@given(
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.floats(float(np.float32(1e-7)), 1.0, width=32),
    st.integers(0, 255),
    BITS,
)
@FEW
def test_requantizing_equals_the_oracle(accumulator: int, multiplier: float, zero_point: int, bits: int) -> None:
    qmin, qmax = activation_limits(bits)
    zero_point %= qmax + 1

    code = requantize(
        torch.tensor(accumulator),
        torch.tensor(multiplier),
        torch.tensor(zero_point),
        torch.tensor(float(qmin)),
        torch.tensor(float(qmax)),
    )

    assert code.item() == oracles.requantize(accumulator, multiplier, zero_point, qmin, qmax)


def test_requantizing_rounds_halves_to_even() -> None:
    half, zero = torch.tensor(0.5), torch.tensor(0.0)

    codes = requantize(torch.tensor([1, 3, 5, 7]), half, zero, zero, torch.tensor(15.0))

    assert codes.tolist() == [0, 2, 2, 4]


@given(
    st.tuples(*[st.floats(float(np.float32(1e-3)), 1.0, width=32)] * 3),
    st.tuples(*[st.integers(0, 255)] * 3),
)
@example((1.0, 1.0, 2.0), (0, 0, 0))  # every second sum is a tie
@example((0.1, 0.3, 0.2), (121, 7, 90))
@settings(deadline=None, max_examples=20)
def test_a_requantized_sum_equals_the_oracle_for_every_pair_of_codes(
    scales: tuple[float, float, float], zero_points: tuple[int, int, int]
) -> None:
    left, right = (torch.arange(256.0).reshape(shape) for shape in ((256, 1), (1, 256)))
    sides = tuple((float(np.float32(scale)), zero) for scale, zero in zip(scales, zero_points, strict=True))
    real = [(codes - zero) * scale for codes, (scale, zero) in zip((left, right), sides, strict=False)]

    offsets = requantize_sum(real[0], real[1], Grids(*sides), -zero_points[2], 255 - zero_points[2])

    expected = oracles.add(left.long().numpy(), right.long().numpy(), scales, zero_points)
    assert np.array_equal(offsets.numpy() + zero_points[2], expected.clip(0, 255))


def test_rounding_passes_gradients_through() -> None:
    x = tensor([0.2, 1.7]).requires_grad_()

    round_through(x).sum().backward()  # type: ignore[no-untyped-call]

    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0]


# Codes 0 to 7 about zero point 3, scale 0.5: the clip is [-1.5, 2.0].
LEARNED = (torch.tensor(0.5), torch.tensor(3.0), 0, 7)


def test_a_learned_grid_has_the_values_of_the_plain_one() -> None:
    x = torch.linspace(-4, 4, 101)

    scale, zero_point, qmin, qmax = LEARNED
    assert torch.equal(learned_fake_quantize(x, *LEARNED), fake_quantize(x, scale, zero_point.int(), qmin, qmax))


def test_the_gradient_of_a_learned_grid_is_one_inside_and_zero_outside_the_clip() -> None:
    x = tensor([-3.0, -1.4, 0.1, 1.9, 3.0]).requires_grad_()

    learned_fake_quantize(x, *LEARNED).sum().backward()  # type: ignore[no-untyped-call]

    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("x", [-5.0, -3.1, 3.3, 6.0])
def test_the_scale_gradient_outside_the_clip_is_the_finite_difference(x: float) -> None:
    """There the value is scale * (qmin - z) or scale * (qmax - z), which has no rounding."""
    scale = torch.tensor(0.5, requires_grad=True)
    learned_fake_quantize(tensor([x]), scale, *LEARNED[1:]).sum().backward()  # type: ignore[no-untyped-call]

    step = 2**-6
    above, below = (fake_quantize(tensor([x]), torch.tensor(0.5 + d), torch.tensor(3), 0, 7) for d in (step, -step))

    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx((above - below).item() / (2 * step))


@pytest.mark.parametrize("x", [-1.1, -0.3, 0.15, 0.6, 1.3])
def test_the_scale_gradient_inside_the_clip_is_that_of_lsq(x: float) -> None:
    """LSQ (1902.08153, eq. 3): round(x / s) - x / s; here by differences with the rounding frozen."""
    scale = torch.tensor(0.5, requires_grad=True)
    learned_fake_quantize(tensor([x]), scale, *LEARNED[1:]).sum().backward()  # type: ignore[no-untyped-call]

    offset = round(x / 0.5) - x / 0.5  # what the rounding adds, constant for the straight-through estimator
    step = 1e-3
    above, below = ((x / (0.5 + d) + offset) * (0.5 + d) for d in (step, -step))

    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx((above - below) / (2 * step), abs=1e-4)


@pytest.mark.parametrize(("x", "gradient"), [(0.2, 0.0), (-3.0, -0.5), (3.0, -0.5)])
def test_a_zero_point_moves_only_the_clipped_values(x: float, gradient: float) -> None:
    zero_point = torch.tensor(3.0, requires_grad=True)

    learned_fake_quantize(tensor([x]), LEARNED[0], zero_point, 0, 7).sum().backward()  # type: ignore[no-untyped-call]

    assert zero_point.grad is not None
    assert zero_point.grad.item() == gradient
