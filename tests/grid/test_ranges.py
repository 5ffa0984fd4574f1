from typing import Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from calque.grid.arithmetic import SMALLEST_SCALE, affine_grid, fake_quantize, weight_limits
from calque.grid.ranges import (
    CLIP_CANDIDATES,
    PERCENTILE,
    ActivationRange,
    TensorSample,
    WeightRange,
    activation_range,
    evenly_spaced,
    search_range,
    weight_scale,
)

BITS = st.integers(2, 8)
FEW = settings(max_examples=25, deadline=None)


def batches(seed: int, *, shift: float = 0.0) -> list[Tensor]:
    """Three batches of unlike size, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(count, 3, 5, generator=generator) + shift for count in (4, 1, 6)]
    made[1][0, 0, 0] = 9.0
    return made


def sample(made: list[Tensor], count: int = 10**6) -> TensorSample:
    return TensorSample.of(
        made, count=count, inputs=sum(len(batch) for batch in made), generator=torch.Generator().manual_seed(0)
    )


def squared_error(values: Tensor, low: Tensor, high: Tensor, bits: int) -> float:
    scale, zero_point = affine_grid(low, high, bits)
    return oracles.rounding_error(values.numpy(), scale.item(), int(zero_point), bits)


def test_a_sample_keeps_the_extremes_and_their_means_per_input() -> None:
    made = batches(0)
    rows = np.concatenate([batch.reshape(len(batch), -1).numpy() for batch in made])

    kept = sample(made)

    assert (kept.low.item(), kept.high.item()) == (rows.min(), rows.max())
    assert kept.mean_low.item() == pytest.approx(rows.min(1).mean(), rel=1e-6)
    assert kept.mean_high.item() == pytest.approx(rows.max(1).mean(), rel=1e-6)


def test_a_sample_of_little_data_is_all_of_it_and_of_much_data_a_part() -> None:
    made = batches(0)

    assert torch.equal(sample(made).values, torch.cat([batch.reshape(-1) for batch in made]))
    assert 40 <= len(sample(made, count=50).values) <= 50
    assert set(sample(made, count=50).values.tolist()) <= set(torch.cat(made).reshape(-1).tolist())


def test_the_extremes_of_a_sample_do_not_depend_on_the_split_into_batches() -> None:
    made = batches(0)

    whole, parts = sample([torch.cat(made)]), sample(made)

    assert (whole.low, whole.high) == (parts.low, parts.high)
    assert whole.mean_high.item() == pytest.approx(parts.mean_high.item(), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
def test_minmax_is_the_extremes_with_zero(shift: float) -> None:
    made = batches(1, shift=shift)
    values = torch.cat(made)

    low, high = activation_range(sample(made), "minmax", 8)

    assert low == min(values.min().item(), 0)
    assert high == max(values.max().item(), 0)


def test_mean_minmax_is_the_mean_of_the_extremes_per_input() -> None:
    made = batches(1)
    rows = torch.cat(made).reshape(11, -1).numpy()

    low, high = activation_range(sample(made), "mean_minmax", 8)

    assert low.item() == pytest.approx(rows.min(1).mean(), rel=1e-6)
    assert high.item() == pytest.approx(rows.max(1).mean(), rel=1e-6)


def test_the_percentile_leaves_out_one_value_in_ten_thousand_on_either_side() -> None:
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)

    low, high = activation_range(sample([torch.from_numpy(values)[None]]), "percentile", 8)

    assert low.item() == pytest.approx(np.quantile(values, 1 - PERCENTILE, method="nearest"))
    assert high.item() == pytest.approx(np.quantile(values, PERCENTILE, method="nearest"))
    assert low > values.min()
    assert high < values.max()


@given(st.integers(0, 1000), BITS, st.sampled_from([0.0, 3.0, -3.0]))
@FEW
def test_least_squares_is_never_worse_than_minmax_on_the_sample(seed: int, bits: int, shift: float) -> None:
    kept = sample(batches(seed, shift=shift))

    chosen = squared_error(kept.values, *activation_range(kept, "least_squares", bits), bits)

    widest = squared_error(kept.values, *activation_range(kept, "minmax", bits), bits)
    assert chosen <= widest * (1 + 1e-6)


def test_least_squares_clips_an_outlier_at_few_bits() -> None:
    kept = sample(batches(2))

    chosen = squared_error(kept.values, *activation_range(kept, "least_squares", 3), 3)

    assert chosen < 0.9 * squared_error(kept.values, *activation_range(kept, "minmax", 3), 3)


def test_least_squares_is_near_the_brute_force_optimum_of_positive_values() -> None:
    values = batches(3)[2].relu()
    kept = sample([values])

    low, high = activation_range(kept, "least_squares", 4)

    finest = np.linspace(0.03, 1, 600) * values.max().item()
    best = min(oracles.rounding_error(values.numpy(), top / 15, 0, 4) for top in finest)
    assert low == 0
    assert squared_error(values, low, high, 4) <= 1.15 * best  # 28 candidates against 600


@given(st.integers(0, 1000), BITS)
@FEW
def test_a_searched_range_is_never_worse_than_the_full_one_by_its_own_error(seed: int, bits: int) -> None:
    values = torch.cat(batches(seed)).reshape(-1, 5)
    weight = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed + 1))

    def error(scale: Tensor, zero_point: Tensor) -> float:
        return ((fake_quantize(values, scale, zero_point, 0, 2**bits - 1) - values) @ weight).square().sum().item()

    low, high = search_range(values.min(), values.max(), bits, error)

    assert error(*affine_grid(low, high, bits)) <= error(*affine_grid(values.min(), values.max(), bits))
    assert values.min() <= low <= 0 <= high <= values.max()


def test_a_searched_range_shrinks_each_side_alone() -> None:
    """An error that wants a fifth of the negative side and all of the positive one."""

    def error(scale: Tensor, zero_point: Tensor) -> float:
        low, high = -zero_point * scale, (255 - zero_point) * scale
        return abs(low.item() + 0.6) + abs(high.item() - 1.0)

    low, high = search_range(torch.tensor(-1.0), torch.tensor(1.0), 8, error)

    assert low.item() == pytest.approx(-0.6, abs=0.1)
    assert high.item() == pytest.approx(1.0, abs=0.1)


def test_the_full_range_wins_ties() -> None:
    low, high = search_range(torch.tensor(-1.0), torch.tensor(2.0), 8, lambda scale, zero_point: 1.0)

    assert (low.item(), high.item()) == (-1.0, 2.0)


@pytest.mark.parametrize("kind", ["minmax", "mean_minmax", "percentile", "least_squares"])
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_constant_tensor_is_represented(kind: ActivationRange, value: float) -> None:
    kept = sample([torch.full((3, 4), value)])

    scale, zero_point = affine_grid(*activation_range(kept, kind, 4), 4)

    assert fake_quantize(torch.tensor(value), scale, zero_point, 0, 15).item() == pytest.approx(value, rel=1e-6)


def weights(seed: int, groups: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, 3, 8, generator=generator) * torch.tensor([1.0, 1e-3, 1e3])[:, None]


def moments(seed: int, groups: int = 2) -> Tensor:
    x = torch.randn(groups, 50, 8, generator=torch.Generator().manual_seed(seed))
    x = x * torch.linspace(0.1, 4, 8)
    return x.transpose(1, 2) @ x / 50


def row_errors(
    weight: Tensor, scale: Tensor, bits: int, H: Tensor
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """e H e^T per row, in float64."""
    qmin, qmax = weight_limits(bits)
    w, s = weight.double().numpy(), scale.double().numpy()[..., None]
    e = np.clip(np.rint(w / s), qmin, qmax) * s - w
    return np.asarray(np.einsum("gok,gkl,gol->go", e, H.double().numpy(), e))


@given(st.integers(0, 100), BITS)
@FEW
def test_minmax_is_the_smallest_weight_scale_that_clips_nothing(seed: int, bits: int) -> None:
    qmin, qmax = weight_limits(bits)
    weight = weights(seed).double()

    scale = weight_scale(weights(seed), bits, "minmax").double()

    ratios = weight / scale[..., None]
    assert ratios.min() >= qmin * (1 + 1e-6)
    assert ratios.max() <= qmax * (1 + 1e-6)
    touching = torch.maximum(ratios.amax(-1) / qmax, ratios.amin(-1) / qmin)
    assert torch.allclose(touching, torch.ones_like(touching))


@given(st.integers(0, 100), BITS)
@FEW
def test_least_squares_weight_scales_are_no_worse_than_minmax_in_any_row(seed: int, bits: int) -> None:
    weight, identity = weights(seed), torch.eye(8).expand(2, 8, 8)

    chosen = row_errors(weight, weight_scale(weight, bits, "least_squares"), bits, identity)

    widest = row_errors(weight, weight_scale(weight, bits, "minmax"), bits, identity)
    assert (chosen <= widest * (1 + 1e-5)).all()


@given(st.integers(0, 100), BITS)
@FEW
def test_output_weight_scales_are_no_worse_than_the_others_by_the_output_error(seed: int, bits: int) -> None:
    weight, H = weights(seed), moments(seed)

    chosen = row_errors(weight, weight_scale(weight, bits, "output", H), bits, H)

    kinds: tuple[Literal["minmax", "least_squares"], ...] = ("minmax", "least_squares")
    for kind in kinds:
        assert (chosen <= row_errors(weight, weight_scale(weight, bits, kind), bits, H) * (1 + 1e-4)).all()


def test_output_weight_scales_differ_from_least_squares_where_inputs_differ_in_size() -> None:
    weight, H = weights(0), moments(0)

    assert not torch.equal(weight_scale(weight, 3, "output", H), weight_scale(weight, 3, "least_squares"))


@pytest.mark.parametrize("kind", get_args(WeightRange))
def test_weight_scales_follow_the_scale_of_the_weights(kind: WeightRange) -> None:
    weight, H = weights(0), moments(0)

    scaled = weight_scale(weight * 2.0**-10, 4, kind, H)

    assert torch.allclose(scaled, weight_scale(weight, 4, kind, H) * 2.0**-10, rtol=1e-6)


@pytest.mark.parametrize("kind", get_args(WeightRange))
def test_a_channel_of_zeros_gets_the_smallest_scale_and_leaves_the_others_alone(kind: WeightRange) -> None:
    weight, H = weights(0), moments(0)
    silent = weight.clone()
    silent[1, 2] = 0

    scale = weight_scale(silent, 4, kind, H)

    assert scale[1, 2].item() == SMALLEST_SCALE
    others = torch.ones_like(scale, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(scale[others], weight_scale(weight, 4, kind, H)[others])


@pytest.mark.parametrize("kind", get_args(WeightRange))
@pytest.mark.parametrize("value", [0.7, -0.7])
def test_a_constant_channel_is_represented(kind: WeightRange, value: float) -> None:
    weight = torch.full((1, 1, 8), value)

    scale = weight_scale(weight, 4, kind, moments(0, groups=1))

    qmin, qmax = weight_limits(4)
    codes = (weight / scale[..., None]).round().clamp(qmin, qmax)
    assert torch.allclose(codes * scale[..., None], weight, rtol=1e-5)


@pytest.mark.parametrize(("first", "last", "count"), [(1.0, 0.2, 60), (1.0, 0.15, 60), (-0.3, 1.5, 17)])
def test_evenly_spaced_numbers_are_torchs_to_the_last_bit_but_one(first: float, last: float, count: int) -> None:
    made = torch.tensor(evenly_spaced(first, last, count))

    torch.testing.assert_close(made, torch.linspace(first, last, count), rtol=2**-22, atol=2**-26)
    assert made.tolist() == evenly_spaced(first, last, count)  # float32 numbers


def test_clips_follow_evenly_spaced_logarithms() -> None:
    torch.testing.assert_close(
        torch.tensor(CLIP_CANDIDATES[12:]), torch.logspace(-0.3, -1.5, 16), rtol=2**-20, atol=0.0
    )
