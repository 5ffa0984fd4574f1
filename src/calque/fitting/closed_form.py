"""A layer's weights, scales and bias in closed form, from second moments of its sampled inputs; no backward pass.

With column means removed the error of a layer with weights Q depends on its rows only through H = cov(X_q) and
C = cov(X_q, T), X_q its quantized inputs and T the float outputs. With a ridge that pulls towards the float weights W,

    |T - X_q Q^T|^2 + lambda |Q - W|^2 = const + tr (Q - W*) M (Q - W*)^T,   M = H + lambda I,   M W*^T = C + lambda W^T

so that rounding W* in the metric M (GPTQ, coordinate descent, scales) is all that is left. W* also undoes what the quantized
prefix got wrong. lambda is chosen on the rows held out of the fit, after rounding.

Sources: GPTQ (2210.17323), Qronos (2505.11695), GPTAQ (2504.02692) for the corrected target; docs/method.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calque.fitting.problem import Fit, Grid, LayerProblem, round_to_nearest, rows_together
from calque.fitting.rounding import Metric, descend, gptq, initial_scale, refitted_groups, refitted_scale

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the mean power of an input
LEAST_SHARE = 1e-3  # of the mean power of moments, as a unit of ridges
LEAST_POWER = 1e-10  # of the squared unit of the inputs: M stays positive definite where they are the same everywhere
CLIP_STEPS = 4  # of the majorization; later ones gain little
TOGETHER = 2**24  # values of the matrices that are factorized at once
FACTORS = (0.7, 0.76, 0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18, 1.25)  # of the initial scales, judged after GPTQ


@dataclass(frozen=True)
class Moments:
    """Second moments about the means of `count` rows.

    Attributes:
        power: H (groups, K, K).  cross: C (groups, K, O).  inputs: (groups, K, 1).  outputs: (groups, 1, O), the means.
    """

    power: Tensor
    cross: Tensor
    inputs: Tensor
    outputs: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, targets: Tensor) -> "Moments":
        """Of inputs (groups, R, K) and targets (groups, R, O)."""
        mean, output, count = x.mean(1, keepdim=True), targets.mean(1, keepdim=True), targets.shape[1]
        centred = x - mean
        return cls(centred.mT @ centred / count, centred.mT @ (targets - output) / count, mean.mT, output, count)

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets of rows together."""
        count = self.count + other.count
        a, b = self.count / count, other.count / count
        shift, rise = other.inputs - self.inputs, other.outputs - self.outputs
        return Moments(
            a * self.power + b * other.power + a * b * shift @ shift.mT,
            a * self.cross + b * other.cross + a * b * shift @ rise,
            a * self.inputs + b * other.inputs,
            a * self.outputs + b * other.outputs,
            count,
        )

    def ordered(self, order: Tensor) -> "Moments":
        """With the inputs in another order, int64 (groups, K)."""
        power = self.power.gather(1, order[:, :, None].expand_as(self.power))
        power = power.gather(2, order[:, None].expand_as(power))
        cross = self.cross.gather(1, order[:, :, None].expand_as(self.cross))
        return replace(self, power=power, cross=cross, inputs=self.inputs.gather(1, order[:, :, None]))


@dataclass(frozen=True)
class _Clips:
    """Targets that the activation clips: every output beyond the bound is as good as the target.

    Taking W*'s own output there, or the bound if that is inside, majorizes the error after the activation. H stays; only C moves,
    and a fit to the moved targets can only lower that error. (Following the rounded layer instead of W* overfits:
    docs/experiments.md.)

    Attributes:
        x: inputs (groups, R, K).  targets: (groups, R, O), before the activation.
    """

    x: Tensor
    targets: Tensor
    activation: Callable[[Tensor], Tensor]

    def followed(self, moments: Moments, weight: Tensor) -> Moments:
        """The moments once clipped targets follow the layer with that weight (groups, K, O), and the bias that suits it."""
        moved = (self.x @ weight).add_(moments.outputs - moments.inputs.mT @ weight)
        together = rows_together(moved)
        for output, targets in zip(
            torch.split(moved, together, 1), torch.split(self.targets, together, 1), strict=True
        ):
            bounds = self.activation(targets)
            beyond = torch.where(targets < bounds, output.minimum(bounds), output.maximum(bounds))
            output.copy_(torch.where(targets == bounds, targets, beyond))
        mean = moved.mean(1, keepdim=True)
        moved -= mean
        cross = (self.x.mT @ moved - moments.inputs @ moved.sum(1, keepdim=True)) / self.x.shape[1]
        return replace(moments, cross=cross, outputs=mean)


class ClosedFormSolver:
    """One layer's fits to its float output, at any number of weight bits: its moments and the factorizations of M serve all.

    Weights and codes are (groups, K, O) with the strongest inputs first; scales (groups, 1, O), or (1, K, O) where the problem
    has groups of inputs.

    Args:
        problem: it is used up: its patches, a good part of a memory budget, are overwritten with the inputs that the fits read.
        grid: of the input, which stays.
        rounds: of coordinate descent and refitted scales after GPTQ.
    """

    @torch.no_grad()
    def __init__(self, problem: LayerProblem, grid: Grid | None, rounds: int):
        self.problem, self.grid, self.rounds = problem, grid, rounds
        fitted, rows = len(problem.fitted), torch.cat([problem.fitted, problem.held_out])
        together = torch.equal(rows, torch.arange(problem.patches.shape[1], device=rows.device))
        self.all_targets = problem.targets if together else problem.targets[:, rows]
        self.targets, self.held_out_targets = self.all_targets[:, :fitted], self.all_targets[:, fitted:]
        self.all_x = problem.patches if together else problem.patches[:, rows]
        self.x, self.held_out = self.all_x[:, :fitted], self.all_x[:, fitted:]
        if grid is not None:
            _overwrite_(self.all_x, grid.quantize)
        moments = Moments.of(self.x, self.targets)
        power = moments.power.diagonal(dim1=1, dim2=2)
        self.order = power.argsort(1, descending=True)
        index = self.order[:, None]
        _overwrite_(self.all_x, lambda part: part.gather(2, index.expand_as(part)))
        self.moments = moments.ordered(self.order)
        self.inverse = self.order.argsort(1)
        self.weight = problem.weight.gather(2, index.expand_as(problem.weight)).mT.contiguous()
        self.unit = power.mean().clamp(min=LEAST_POWER)
        # of all ridges together, and of the last one; each with its H
        self.metrics: dict[tuple[float, ...], tuple[Tensor, Metric]] = {}

    @torch.no_grad()
    def fit(self, bits: int) -> Fit:
        """The layer with weights of so many bits, or rounded to nearest where that is better on the held-out rows.

        What was chosen on them is then fitted to all rows; the error `after` is that of the choice, before it.
        """
        problem = self.problem
        scale = self._initial(self.weight, self.moments.power, bits)
        inputs = self.held_out.gather(2, self.inverse[:, None].expand_as(self.held_out))
        start = round_to_nearest(problem, self._stored(scale), self.grid, bits, inputs=inputs)
        del inputs
        ridge, error = self._best_ridge(bits)
        everything = self.moments.merged(Moments.of(self.held_out, self.held_out_targets))
        if problem.clipped:
            moved, best = self._followed(self.moments, ridge, _Clips(self.x, self.targets, problem.activation))
            clipped = self._trials(moved, (ridge,), bits)[0]
            if clipped < error:
                error = clipped
                everything = _Clips(self.all_x, self.all_targets, problem.activation).followed(everything, best)
        if not error < start.after:
            return start
        codes, scale, bias = self._rounded(everything, ridge, bits)
        real = torch.empty_like(codes).scatter_(1, self.order[:, :, None].expand_as(codes), codes)
        return Fit(real.mT.to(torch.int8).contiguous(), self._stored(scale), bias, self.grid, start.before, error)

    def _initial(self, weight: Tensor, matrix: Tensor, bits: int) -> Tensor:
        """`initial_scale` of weights (B, K, O) in the metric of a matrix (B, K, K), B a multiple of the groups."""
        diagonal, size = matrix.diagonal(dim1=1, dim2=2), self.problem.group
        if size is None:
            return initial_scale(weight, diagonal, bits)
        inverse = self.inverse[0]
        grouped, power = weight[:, inverse].reshape(-1, size, weight.shape[2]), diagonal[:, inverse].reshape(-1, size)
        scale = initial_scale(grouped, power, bits).expand(-1, size, -1)
        return scale.reshape(weight.shape)[:, self.order[0]]

    def _refitted(self, metric: Metric, target: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        if self.problem.group is None:
            return refitted_scale(metric, target, codes, scale)
        return refitted_groups(metric, target, codes, scale, list(torch.split(self.inverse[0], self.problem.group)))

    def _stored(self, scale: Tensor) -> Tensor:
        """The scales as a fit has them: (groups, O), or (1, O, G)."""
        size = self.problem.group
        return scale[:, 0] if size is None else scale[:, self.inverse[0, ::size]].mT.contiguous()

    def _solved(self, moments: Moments, ridges: tuple[float, ...]) -> tuple[Metric, Tensor]:
        """M and W* (ridges * groups, K, O)."""
        strength = torch.tensor(ridges, device=self.unit.device)[:, None, None, None] * self._unit(moments)
        kept = self.metrics.get(ridges)
        if kept is None or kept[0] is not moments.power:  # clipped targets that move leave H as it was
            matrix = moments.power.repeat(len(ridges), 1, 1)
            matrix.view(len(ridges), -1, *matrix.shape[1:]).diagonal(dim1=2, dim2=3).add_(strength[..., 0])
            kept = moments.power, Metric.of(matrix)
            self.metrics = {key: self.metrics[key] for key in self.metrics if key == RIDGES} | {ridges: kept}
        metric = kept[1]
        return metric, metric.solve((moments.cross + strength * self.weight).flatten(0, 1))

    def _followed(self, moments: Moments, ridge: float, clips: _Clips) -> tuple[Moments, Tensor]:
        """The moments once clipped targets and W* have followed each other CLIP_STEPS times, and the last W*."""
        metric, best = self._solved(moments, (ridge,))
        for _ in range(CLIP_STEPS):
            moments = clips.followed(moments, best)
            best = metric.solve(moments.cross + ridge * self._unit(moments) * self.weight)
        return moments, best

    def _unit(self, moments: Moments) -> Tensor:
        """Of ridges: the mean power of the fitted rows, or what keeps these moments invertible where those hardly differ."""
        return torch.maximum(self.unit, LEAST_SHARE * moments.power.diagonal(dim1=1, dim2=2).mean())

    def _best_ridge(self, bits: int) -> tuple[float, float]:
        """The ridge with the least held-out error, and that error.

        All of them where they are factorized at once; one after the other, downhill from the middle, where each takes long.
        """
        groups, size = self.moments.power.shape[:2]
        if len(RIDGES) * groups * size * size <= TOGETHER:
            known = dict(enumerate(self._trials(self.moments, RIDGES, bits)))
            best = min(known, key=known.__getitem__)
            return RIDGES[best], known[best]
        known, best, before = {}, len(RIDGES) // 2, None
        while best != before:
            near = [index for index in (best - 1, best, best + 1) if 0 <= index < len(RIDGES)]
            new = [index for index in near if index not in known]
            known |= {index: self._trials(self.moments, (RIDGES[index],), bits)[0] for index in new}
            best, before = min(near, key=known.__getitem__), best
        return RIDGES[best], known[best]

    def _trials(self, moments: Moments, ridges: tuple[float, ...], bits: int) -> list[float]:
        """The held-out errors after GPTQ alone."""
        groups, size = moments.power.shape[:2]
        together = max(1, TOGETHER // (groups * size * size))
        errors = []
        for start in range(0, len(ridges), together):
            part = ridges[start : start + together]
            metric, target = self._solved(moments, part)
            scales = self._initial(target, metric.matrix, bits)
            found = gptq(metric, target, scales, bits)
            for codes, scale in zip(torch.split(found, groups), torch.split(scales, groups), strict=True):
                error = self._error(codes, scale, _bias(moments, codes, scale))
                errors.append(math.inf if math.isnan(error) else error)
        return errors

    def _rounded(self, moments: Moments, ridge: float, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and bias: each row's scale from a grid by its error after GPTQ, then rounds of descent and refit."""
        metric, target = self._solved(moments, (ridge,))
        initial = self._initial(target, metric.matrix, bits)
        groups, _, rows = target.shape
        trial_scales = torch.cat([factor * initial for factor in FACTORS], 2)
        repeated = target.repeat(1, 1, len(FACTORS))
        trials = gptq(metric, repeated, trial_scales, bits)
        errors = metric.error(trials * trial_scales - repeated)
        best = errors.reshape(groups, -1, rows).argmin(1, keepdim=True)
        scale, codes = (_chosen(each.reshape(groups, -1, len(FACTORS), rows), best) for each in (trial_scales, trials))
        for _ in range(self.rounds):
            scale = self._refitted(metric, target, codes, scale)
            codes = descend(metric, target, codes, scale, bits)
        scale = self._refitted(metric, target, codes, scale)
        return codes, scale, _bias(moments, codes, scale)

    def _error(self, codes: Tensor, scale: Tensor, bias: Tensor) -> float:
        return self.problem.held_out_error(self.held_out, (codes * scale).mT, bias)


def _overwrite_(rows: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Puts what a function of rows (groups, R, K) makes of them in their place, some at a time."""
    for part in torch.split(rows, rows_together(rows), 1):
        part.copy_(change(part))


def _bias(moments: Moments, codes: Tensor, scale: Tensor) -> Tensor:
    """(groups, 1, O), which makes the mean output right."""
    return moments.outputs - moments.inputs.mT @ (codes * scale)


def _chosen(trials: Tensor, best: Tensor) -> Tensor:
    """(B, K, R) of (B, K, trials, R), by the row's number (B, 1, R)."""
    return trials.gather(2, best[:, None].expand(-1, trials.shape[1], -1, -1))[:, :, 0]
