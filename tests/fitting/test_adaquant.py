from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import networks
from calque.fitting.adaquant import fit_layer
from calque.fitting.problem import (
    POSITIONS,
    Fit,
    Grid,
    LayerProblem,
    covariance,
    layer_problem,
    output_error,
    round_to_nearest,
)
from calque.grid.arithmetic import affine_grid
from calque.grid.ranges import weight_scale
from calque.network import Geometry, capture
from calque.settings import RelativeRates

# The solver is tested at step sizes of its own, so that tuning the recipes moves no result here.
RATES = RelativeRates(weight=0.03, weight_scale=3e-3, bias=3e-3, activation_scale=3e-3, zero_point=3e-2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(x: Tensor) -> Tensor:
    return x


CASES = {
    "plain": (Geometry("convolution"), (6, 4, 3, 3), (5, 4, 8, 7)),
    "stride and dilation": (
        Geometry("convolution", (2, 1), (1, 1, 1, 1), (1, 2)),
        (6, 4, 3, 2),
        (5, 4, 8, 7),
    ),
    "asymmetric padding": (Geometry("convolution", (2, 2), (0, 1, 3, 2)), (6, 4, 3, 3), (5, 4, 8, 7)),
    "groups": (Geometry("convolution", groups=2, padding=(1, 1, 1, 1)), (6, 2, 3, 3), (5, 4, 8, 7)),
    "depthwise": (Geometry("convolution", (2, 2), (2, 2, 2, 2), (1, 1), 4), (4, 1, 5, 5), (5, 4, 8, 7)),
    "linear": (Geometry("linear"), (6, 10), (5, 10)),
    "linear on three axes": (Geometry("linear"), (6, 10), (5, 3, 10)),
    "linear on four axes": (Geometry("linear"), (6, 10), (5, 3, 2, 10)),
}


def made(case: str) -> LayerProblem:
    geometry, weight_shape, input_shape = CASES[case]
    weight, bias = (
        torch.randn(weight_shape, generator=generator(1)),
        torch.randn(weight_shape[0], generator=generator(2)),
    )
    x = torch.randn(input_shape, generator=generator(3))
    pairs = [(part, geometry.apply(part, weight, bias)) for part in networks.pieces(x, 2)]
    return layer_problem(geometry, weight, bias, same, pairs, inputs=len(x), generator=generator())


@pytest.mark.parametrize("case", CASES)
def test_patches_times_weight_are_the_layers_output_at_the_sampled_positions(case: str) -> None:
    problem = made(case)

    output = problem.patches @ problem.weight.transpose(1, 2) + problem.bias

    torch.testing.assert_close(output, problem.targets, rtol=1e-4, atol=1e-4)
    assert problem.patches.shape[1] >= 5


@pytest.mark.parametrize("case", CASES)
def test_no_input_is_both_fitted_and_held_out(case: str) -> None:
    problem = made(case)
    per_input = problem.patches.shape[1] // 5

    fitted, held_out = ({int(row) // per_input for row in rows} for rows in (problem.fitted, problem.held_out))

    assert fitted == {0, 1, 2, 3}
    assert held_out == {4}  # one in five


def test_a_single_input_is_fitted_and_judged_on_itself() -> None:
    x = torch.randn(1, 10, generator=generator())
    weight = torch.randn(2, 10, generator=generator())

    problem = layer_problem(
        Geometry("linear"), weight, torch.zeros(2), same, [(x, x @ weight.T)], inputs=1, generator=generator()
    )

    assert problem.fitted.tolist() == problem.held_out.tolist() == [0]


def test_positions_are_sampled_not_all_taken() -> None:
    geometry, weight = Geometry("convolution"), torch.randn(2, 1, 3, 3, generator=generator())
    x = torch.randn(3, 1, 20, 20, generator=generator())

    problem = layer_problem(
        geometry,
        weight,
        torch.zeros(2),
        same,
        [(x, geometry.apply(x, weight, None))],
        inputs=3,
        generator=generator(),
    )

    assert problem.patches.shape == (1, 3 * POSITIONS, 9)
    assert len({tuple(row) for row in problem.patches[0].tolist()}) == 3 * POSITIONS  # none twice


def test_of_masked_tokens_each_real_one_is_taken_once() -> None:
    x, weight = torch.arange(30.0).reshape(5, 6, 1), torch.ones(1, 1)
    mask = torch.arange(6) < torch.tensor([2, 6, 1, 5, 3])[:, None]

    problem = layer_problem(
        Geometry("linear"), weight, torch.zeros(1), same, [(x, x)], inputs=5, generator=generator(), masks=[mask]
    )

    assert problem.patches.flatten().sort().values.tolist() == x[mask].flatten().tolist()
    assert problem.patches[0, problem.held_out].flatten().sort().values.tolist() == [24, 25, 26]  # the last input's


def test_the_error_is_relative_to_the_variance_of_the_targets() -> None:
    problem = made("plain")
    zero = torch.zeros_like(problem.weight)

    at_the_mean = problem.error(problem.patches, zero, problem.targets.mean(1, keepdim=True), problem.fitted)

    assert problem.error(problem.patches, problem.weight, problem.bias, problem.fitted) < 1e-9
    assert at_the_mean == pytest.approx(1, abs=0.1)  # the means of all rows, not of the fitted alone


def test_the_error_of_rows_that_are_all_clipped_is_finite_and_bounded(problem: LayerProblem) -> None:
    silent = replace(problem, targets=-problem.targets.abs() - 1, activation=torch.relu)

    assert silent.error(problem.patches, problem.weight, problem.bias, problem.fitted) < 1e5


def test_the_covariance_is_that_of_the_fitted_rows() -> None:
    problem = made("groups")

    for group, H in enumerate(covariance(problem)):
        expected = torch.cov(problem.patches[group, problem.fitted].T, correction=0)
        torch.testing.assert_close(H, expected, rtol=1e-4, atol=1e-5)


def test_the_output_error_of_a_fine_grid_is_small_and_of_a_coarse_one_larger() -> None:
    problem = made("linear on three axes")
    low, high = problem.patches.min(), problem.patches.max()

    error = output_error([problem])
    errors = [error(*affine_grid(low, high, bits), 2**bits - 1) for bits in (2, 4, 8)]

    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


@pytest.fixture(scope="module")
def problem(trained: networks.Residual, calibration: Tensor) -> LayerProblem:
    """The trained network's first convolution behind the stem, on its float inputs."""
    layer = capture(trained, {"image": calibration[:4]}).weighted("conv1")
    with torch.no_grad():
        x = F.relu(trained.stem_norm(trained.stem(calibration)))
    pairs = [(part, layer(part)) for part in networks.pieces(x, 50)]
    return layer_problem(
        layer.geometry, layer.weight, layer.bias, torch.relu, pairs, inputs=len(x), generator=generator()
    )


def start_of(problem: LayerProblem, bits: int = 4, *, with_grid: bool = True) -> Fit:
    scale, zero_point = affine_grid(problem.patches.min(), problem.patches.max(), bits)
    grid = Grid(scale, zero_point, 2**bits - 1) if with_grid else None
    return round_to_nearest(problem, weight_scale(problem.weight, bits, "least_squares"), grid, bits)


def fitted(
    problem: LayerProblem,
    start: Fit,
    *,
    steps: int = 60,
    bits: int = 4,
    seed: int = 0,
    codes: Tensor | None = None,
    learn_grid: bool = True,
) -> Fit:
    return fit_layer(
        problem,
        start,
        bits,
        steps=steps,
        rates=RATES,
        generator=generator(seed),
        codes=codes,
        learn_grid=learn_grid,
    )


def test_rounding_to_nearest_rounds_every_weight_to_the_nearest_level(problem: LayerProblem) -> None:
    start = start_of(problem, 8)

    levels = problem.weight / start.scale[..., None]
    assert torch.equal(start.codes.float(), levels.round().clamp(-128, 127))
    assert start.before == start.after


def judged(problem: LayerProblem, fit: Fit) -> float:
    """The held-out error of a fit, from what it holds."""
    inputs = problem.patches if fit.grid is None else fit.grid.quantize(problem.patches)
    return problem.error(inputs, fit.codes.float() * fit.scale[..., None], fit.bias, problem.held_out)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("with_grid", [True, False])
def test_a_fit_is_never_worse_than_its_start_and_reports_its_own_error(
    problem: LayerProblem, bits: int, with_grid: bool
) -> None:
    start = start_of(problem, bits, with_grid=with_grid)

    fit = fitted(problem, start, bits=bits, steps=24)

    assert fit.after <= start.after
    assert fit.before == start.before
    assert fit.after == pytest.approx(judged(problem, fit), rel=1e-3)


def test_a_fit_with_ruinous_step_sizes_stays_at_its_start_or_better(problem: LayerProblem) -> None:
    rates = replace(RATES, weight=50.0, weight_scale=5.0, bias=100.0, activation_scale=5.0)
    start = start_of(problem)

    fit = fit_layer(problem, start, 4, steps=24, rates=rates, generator=generator())

    assert judged(problem, fit) <= start.after * (1 + 1e-6)


def test_a_fit_improves_a_trained_layer_at_four_bits(problem: LayerProblem) -> None:
    start = start_of(problem)

    fit = fitted(problem, start, steps=200)

    assert judged(problem, fit) < 0.85 * start.after


def test_a_fit_moves_codes_and_keeps_them_in_range(problem: LayerProblem) -> None:
    start = start_of(problem, 3)

    fit = fitted(problem, start, bits=3)

    assert (fit.codes != start.codes).any()
    assert fit.codes.min() >= -4
    assert fit.codes.max() <= 3
    assert fit.codes.dtype == torch.int8


def test_the_same_seed_gives_the_same_fit_and_another_seed_another(problem: LayerProblem) -> None:
    start = start_of(problem)

    one, two, other = (fitted(problem, start, seed=seed) for seed in (0, 0, 1))

    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one.bias, two.bias)
    assert not torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
def test_step_sizes_are_relative_to_the_layers_scale(problem: LayerProblem, factor: float) -> None:
    scaled = replace(
        problem, weight=problem.weight * factor, bias=problem.bias * factor, targets=problem.targets * factor
    )

    one, other = (fitted(each, start_of(each)) for each in (problem, scaled))

    assert other.after == pytest.approx(one.after, rel=1e-2)
    assert (one.codes != other.codes).float().mean() < 0.01


def test_fixed_codes_stay_while_scale_and_bias_move(problem: LayerProblem) -> None:
    start = start_of(problem, 3)
    codes = start.codes.roll(1, -1)
    start = round_to_nearest(problem, start.scale, start.grid, 3, codes)

    fit = fitted(problem, start, bits=3, codes=codes)

    assert torch.equal(fit.codes, codes)
    assert fit.after < start.after


def test_a_fixed_grid_stays(problem: LayerProblem) -> None:
    start = start_of(problem)

    fit = fitted(problem, start, learn_grid=False)

    assert fit.grid is start.grid
    assert fit.after < start.after


def test_a_learned_grid_moves(problem: LayerProblem) -> None:
    start = start_of(problem)

    fit = fitted(problem, start)

    assert fit.grid is not None
    assert start.grid is not None
    assert fit.grid.scale != start.grid.scale
    assert fit.grid.zero_point == 0  # the input is a ReLU's


def test_no_steps_at_all_correct_the_bias_at_most(problem: LayerProblem) -> None:
    start = start_of(problem)

    fit = fitted(problem, start, steps=0)

    assert torch.equal(fit.codes, start.codes)
    assert torch.equal(fit.scale, start.scale)


def test_a_fit_changes_neither_the_problem_nor_the_start(problem: LayerProblem) -> None:
    start = start_of(problem)
    before = [tensor.clone() for tensor in (problem.weight, problem.bias, problem.patches, start.scale, start.bias)]

    fitted(problem, start)

    after = (problem.weight, problem.bias, problem.patches, start.scale, start.bias)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, after, strict=True))


def test_a_layer_of_zeros_is_fitted_without_a_number_that_is_not_finite() -> None:
    x = torch.randn(20, 6, generator=generator())
    problem = layer_problem(
        Geometry("linear"), torch.zeros(3, 6), torch.zeros(3), same, [(x, torch.zeros(20, 3))], inputs=20,
        generator=generator(),
    )  # fmt: skip

    fit = fitted(problem, start_of(problem))

    assert fit.codes.eq(0).all()
    assert torch.isfinite(fit.scale).all()
    assert torch.isfinite(fit.bias).all()
