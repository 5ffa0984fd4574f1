"""The closed-form solver against NumPy, and what it must gain."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import calque
import calque.pipeline.build
import networks
from calque.fitting import closed_form
from calque.fitting.closed_form import ClosedFormSolver, Moments
from calque.fitting.problem import Grid, LayerProblem
from calque.fitting.rounding import FRACTIONS, Metric, descend, gptq, initial_scale, refitted_scale
from calque.grid.arithmetic import affine_grid
from calque.recipe import FAST, Recipe
from slow import slow

Array = NDArray[np.float64]
BITS = 3
QMIN, QMAX = -4, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def definite(batch: int, size: int, seed: int = 0) -> Tensor:
    """Matrices with correlated rows."""
    root = random(batch, size, 3 * size, seed=seed) + 2 * random(batch, 1, 3 * size, seed=seed + 1)
    return root @ root.mT / (3 * size)


def problem(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    activation: Callable[[Tensor], Tensor] = lambda value: value,
) -> LayerProblem:
    """The problem of rows x (groups, R, K), copied, of which the last fifth is held out; a solver uses it up."""
    rows = torch.arange(x.shape[1])
    border = max(1, 4 * len(rows) // 5)
    bias = torch.zeros(weight.shape[0], 1, weight.shape[1])
    return LayerProblem(x.clone(), targets, weight, bias, rows[:border], rows[min(border, len(rows) - 1) :], activation)


def copied(case: LayerProblem) -> LayerProblem:
    """The problem with rows of its own, for another solver."""
    return replace(case, patches=case.patches.clone())


def test_moments_are_the_covariances() -> None:
    x, targets = random(2, 50, 4) + 3, random(2, 50, 5, seed=1) - 2

    moments = Moments.of(x, targets)

    for group in range(2):
        both = np.cov(torch.cat([x, targets], 2)[group].double().numpy().T, bias=True)
        np.testing.assert_allclose(moments.power[group], both[:4, :4], atol=1e-5)
        np.testing.assert_allclose(moments.cross[group], both[:4, 4:], atol=1e-5)


def test_merged_moments_are_those_of_all_rows() -> None:
    x, targets = random(2, 50, 4) + 3, random(2, 50, 5, seed=1) - 2
    x[:, 30:] += 1

    merged = Moments.of(x[:, :30], targets[:, :30]).merged(Moments.of(x[:, 30:], targets[:, 30:]))

    together = Moments.of(x, targets)
    assert merged.count == 50
    for name in ("power", "cross", "inputs", "outputs"):
        torch.testing.assert_close(getattr(merged, name), getattr(together, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [7, 300])
def test_the_root_of_the_inverse_is_upper_triangular(size: int) -> None:
    matrix = definite(2, size).double()

    metric = Metric.of(matrix)

    root = metric.inverse_root
    torch.testing.assert_close(root, root.triu())
    np.testing.assert_allclose(root.mT @ root, np.linalg.inv(matrix.double().numpy()), rtol=1e-3, atol=1e-4)
    right = random(2, size, 3).double()
    torch.testing.assert_close(matrix @ metric.solve(right), right, rtol=1e-3, atol=1e-3)


def test_the_initial_scale_is_the_best_of_the_fractions() -> None:
    weight, diagonal = random(2, 9, 4), random(2, 9, seed=1).square()

    scale = initial_scale(weight, diagonal, BITS)

    for group in range(2):
        for row in range(4):
            w, d = weight[group, :, row].double().numpy(), diagonal[group].double().numpy()
            widest = max(w.max() / QMAX, w.min() / QMIN)
            errors = {}
            for fraction in FRACTIONS:
                step = fraction * widest
                errors[step] = (d * (np.clip(np.round(w / step), QMIN, QMAX) * step - w) ** 2).sum()
            assert scale[group, 0, row].item() == pytest.approx(min(errors, key=errors.__getitem__), rel=1e-4)


def reference_gptq(matrix: Array, weight: Array, scale: float) -> Array:
    """Optimal brain quantization in a fixed order, with the inverse of what is left computed anew for each column."""
    left, codes = weight.copy(), np.zeros_like(weight)
    for k in range(len(weight)):
        inverse = np.linalg.inv(matrix[k:, k:])
        codes[k] = np.clip(np.round(left[k] / scale), QMIN, QMAX)
        left[k:] -= inverse[:, 0] / inverse[0, 0] * (left[k] - codes[k] * scale)
    return codes


@pytest.mark.parametrize("size", [1, 9, slow(150)])  # within one block of columns and over several
def test_gptq_is_optimal_brain_quantization(size: int) -> None:
    matrix, weight = definite(2, size), random(2, size, 3, seed=2)
    scale = torch.tensor([[[0.5, 0.6, 0.7]], [[0.4, 0.5, 0.55]]])

    codes = gptq(Metric.of(matrix.double()), weight.double(), scale.double(), BITS)

    for group in range(2):
        for row in range(3):
            expected = reference_gptq(
                matrix[group].double().numpy(),
                weight[group, :, row].double().numpy(),
                scale[group, 0, row].double().item(),
            )
            np.testing.assert_array_equal(codes[group, :, row], expected)


@pytest.mark.parametrize("size", [9, 150])
def test_descent_ends_where_no_single_code_can_be_bettered(size: int) -> None:
    metric = Metric.of(definite(1, size).double())
    weight, scale = random(1, size, 2, seed=2).double(), torch.full((1, 1, 2), 0.5).double()
    codes = (weight / 0.5).round().clamp(QMIN, QMAX)
    errors = [metric.error(codes * 0.5 - weight)]

    for _ in range(30):
        codes = descend(metric, weight, codes, scale, BITS)
        errors.append(metric.error(codes * 0.5 - weight))

    assert all((after <= before + 1e-9).all() for before, after in pairwise(errors))
    assert (errors[-1] < errors[0]).all()
    for k in range(size):
        for step in (-1, 1):
            other = codes.clone()
            other[:, k] = (other[:, k] + step).clamp(QMIN, QMAX)
            assert (metric.error(other * 0.5 - weight) >= errors[-1] - 1e-9).all()


def test_the_refitted_scale_is_the_least_squares_one() -> None:
    metric, weight = Metric.of(definite(1, 9).double()), random(1, 9, 2).double()
    codes = (weight / 0.4).round().clamp(QMIN, QMAX)

    scale = refitted_scale(metric, weight, codes, torch.full((1, 1, 2), 0.4).double())

    least = metric.error(codes * scale - weight)
    for factor in (0.4 / scale, 0.999, 1.001):
        assert (metric.error(codes * (scale * factor) - weight) >= least).all()


def test_codes_of_zeros_keep_their_scale() -> None:
    metric = Metric.of(definite(1, 5))

    scale = refitted_scale(metric, random(1, 5, 2), torch.zeros(1, 5, 2), torch.full((1, 1, 2), 0.4))

    assert scale.tolist() == [[[pytest.approx(0.4)] * 2]]


def test_weights_on_a_grid_are_found() -> None:
    codes = random(1, 6, 20, seed=1).mul(2).round().clamp(QMIN, QMAX)
    codes[..., 0] = QMIN
    weight, x = codes * 0.3, random(1, 400, 20)

    fit = ClosedFormSolver(problem(x, x @ weight.mT, weight), None, rounds=3).fit(BITS)

    torch.testing.assert_close(fit.codes, codes.to(torch.int8))
    torch.testing.assert_close(fit.scale, torch.full((1, 6), 0.3), rtol=1e-3, atol=0.0)
    assert fit.after < 1e-5


def test_what_the_quantized_prefix_got_wrong_is_undone() -> None:
    """The inputs lost a fifth of their size and one channel leaks into another; nearest cannot know."""
    weight, x = random(1, 6, 20, seed=1), random(1, 2000, 20)
    received = 0.8 * x
    received[..., 1] += 0.5 * received[..., 0]

    fit = ClosedFormSolver(problem(received, x @ weight.mT, weight), None, rounds=3).fit(8)

    assert fit.before > 0.03
    assert fit.after < 1e-3


@pytest.mark.parametrize(("groups", "outputs"), [(1, 12), (12, 1), (3, 4)])
def test_the_fit_is_much_better_than_rounding_to_nearest(groups: int, outputs: int) -> None:
    root = random(groups, 18, 18, seed=3)
    x = (random(groups, 1500, 18) @ root + 1).relu()
    weight = random(groups, outputs, 18, seed=1)
    grid = Grid(*affine_grid(torch.tensor(0.0), x.max() * 0.7, 4), 15)

    fit = ClosedFormSolver(problem(x, x @ weight.mT, weight), grid, rounds=3).fit(BITS)

    assert fit.after < 0.7 * fit.before
    assert fit.codes.dtype == torch.int8
    assert fit.codes.shape == (groups, outputs, 18)
    assert fit.codes.min() >= QMIN
    assert fit.codes.max() <= QMAX
    assert fit.grid is grid


@pytest.mark.parametrize("side", [1, -1], ids=["clipped below", "clipped above"])
def test_outputs_beyond_a_clip_are_free(side: int) -> None:
    """Half of the outputs are clipped, and no layer gives their values before the clip; a fit to these is worse elsewhere."""
    x, weight = random(1, 4000, 24), random(1, 6, 24, seed=1)
    targets = side * (x @ weight.mT)
    targets = side * torch.where(targets < 0, 4 * targets, targets)

    def activation(value: Tensor) -> Tensor:
        return value.clamp(min=0) if side > 0 else value.clamp(max=0)

    through = ClosedFormSolver(problem(x, targets, weight, activation), None, rounds=3).fit(2)
    plain = ClosedFormSolver(problem(x, targets, weight), None, rounds=3).fit(2)

    rows = torch.arange(3200, 4000)
    judge = problem(x, targets, weight, activation)
    mine = judge.error(x, through.codes * through.scale[..., None], through.bias, rows)
    assert mine < 0.9 * judge.error(x, plain.codes * plain.scale[..., None], plain.bias, rows)


def test_only_clips_are_clips() -> None:
    x, weight = random(1, 50, 4), random(1, 3, 4)

    def clipped(activation: Callable[[Tensor], Tensor]) -> bool:
        return problem(x, x @ weight.mT, weight, activation).clipped

    assert clipped(torch.relu)
    assert clipped(torch.nn.functional.hardtanh)
    assert not clipped(torch.nn.functional.silu)
    assert not clipped(torch.nn.functional.hardswish)
    assert not clipped(lambda value: value)


@pytest.mark.parametrize("x", [torch.zeros(1, 20, 5), torch.ones(1, 20, 5), random(1, 1, 5), random(2, 3, 5)])
def test_inputs_without_information_leave_a_finite_layer(x: Tensor) -> None:
    weight = random(x.shape[0], 4, 5, seed=1)

    fit = ClosedFormSolver(problem(x, x @ weight.mT, weight), None, rounds=3).fit(BITS)

    assert torch.isfinite(fit.scale).all()
    assert torch.isfinite(fit.bias).all()
    assert fit.after <= fit.before


def test_fast_is_better_than_light_on_new_inputs(
    trained: networks.Residual, calibration: Tensor, test_inputs: Tensor
) -> None:
    with torch.no_grad():
        expected = trained(test_inputs)
    error = {}
    for recipe in ("light", "fast"):
        q = calque.quantize(trained, calibration, bits="w2a4", recipe=recipe, first_last=None)
        error[recipe] = (q(test_inputs) - expected).square().mean().item()

    assert error["fast"] < 0.7 * error["light"]


def test_a_layer_in_front_of_an_add_makes_up_for_the_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        y = net.first(x)
        return net.second(torch.relu(y)) + y  # type: ignore[no-any-return]

    parts = {"first": nn.Conv2d(1, 6, 3), "second": nn.Conv2d(6, 6, 3, padding=1)}
    net = networks.seeded(networks.Net(forward, **parts))
    fitted, new = networks.images(128, seed=1), networks.images(128, seed=2)
    plan = {"bits": "w8a8", "override": {"first": "w2a8"}, "first_last": None, "placement": "inputs"}

    def error(recipe: Recipe) -> float:
        q = calque.quantize(net, fitted, recipe=recipe, **plan)  # type: ignore[arg-type]
        return float((q(new) - net(new)).detach().square().mean())

    recipe = replace(FAST, normalization=None)
    corrected = error(recipe)
    monkeypatch.setattr(calque.pipeline.build, "find_shortcuts", lambda network: {})

    assert corrected < 0.9 * error(recipe)


def test_bits_that_share_their_moments_are_fitted_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(1, 200, 12, seed=4)
    weight = random(1, 5, 12, seed=5)
    case = problem(x + 0.4 * random(1, 200, 12, seed=6), x @ weight.mT, weight, torch.relu)
    alone = {bits: ClosedFormSolver(copied(case), None, rounds=2).fit(bits) for bits in (2, 3, 8)}
    counted: list[torch.Size] = []
    factorized = Metric.of

    def count(matrix: Tensor) -> Metric:
        counted.append(matrix.shape)
        return factorized(matrix)

    monkeypatch.setattr(Metric, "of", count)
    shared = ClosedFormSolver(case, None, rounds=2)
    for bits, fit in alone.items():
        again = shared.fit(bits)
        assert torch.equal(again.codes, fit.codes)
        assert torch.equal(again.scale, fit.scale)
        assert torch.equal(again.bias, fit.bias)
    assert counted.count(torch.Size([len(closed_form.RIDGES), 12, 12])) == 1


def test_ridges_that_are_tried_one_after_the_other_end_where_all_at_once_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(1, 200, 12, seed=4)
    weight = random(1, 5, 12, seed=5)
    case = problem(x + 0.4 * random(1, 200, 12, seed=6), x @ weight.mT, weight)
    together = ClosedFormSolver(copied(case), None, rounds=1).fit(BITS)
    tried: list[int] = []
    trials = ClosedFormSolver._trials

    def counted(solver: ClosedFormSolver, moments: Moments, ridges: tuple[float, ...], bits: int) -> list[float]:
        tried.append(len(ridges))
        return trials(solver, moments, ridges, bits)

    monkeypatch.setattr(ClosedFormSolver, "_trials", counted)
    monkeypatch.setattr(closed_form, "TOGETHER", 1)
    alone = ClosedFormSolver(case, None, rounds=1).fit(BITS)

    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.scale, together.scale)
    assert set(tried) == {1}
    assert len(tried) < len(closed_form.RIDGES)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.filterwarnings("ignore::calque.errors.CalibrationWarning")
def test_a_handful_of_inputs_is_fitted(rows: int) -> None:
    for seed in range(3):
        q = calque.quantize(networks.small(seed), networks.images(rows, seed), bits="w8a8")

        assert torch.isfinite(q(networks.images(4, 9))).all()


@pytest.mark.parametrize("grid", [None, Grid(torch.tensor(0.1), torch.tensor(120), 255)], ids=["float", "grid"])
def test_the_rows_of_a_problem_are_held_once(grid: Grid | None) -> None:
    x, weight = random(2, 100, 6, seed=0), random(2, 3, 6, seed=1)
    case = problem(x, x @ weight.mT, weight)
    rows = x if grid is None else grid.quantize(x)

    solver = ClosedFormSolver(case, grid, rounds=1)

    assert solver.x.untyped_storage().data_ptr() == case.patches.untyped_storage().data_ptr()
    order = rows[:, :80].var(1).argsort(1, descending=True)
    assert torch.equal(torch.cat([solver.x, solver.held_out], 1), rows.gather(2, order[:, None].expand_as(rows)))
