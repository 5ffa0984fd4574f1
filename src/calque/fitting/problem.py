"""One layer's least-squares problem on sampled output positions, and what a solver returns for it."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calque.calibration.holdout import held_out_count
from calque.grid.arithmetic import NEGLIGIBLE, TOGETHER, binary_unit, by_input, fake_quantize, weight_limits
from calque.network import Geometry

CONSTANT = 1e-30  # of the squared unit of outputs: the power of those that are the same everywhere
SILENT = 1e-4  # of the power: less variance behind an activation is none
POSITIONS = 32  # sampled output positions per input: 32 to 64 are enough (docs/method.md)
SEARCHED = 2**21  # values of the patches that judge an activation range: wide depthwise layers need few rows
LARGEST = 2**25  # values of the sampled patches and targets at most, 128 MB


@dataclass(frozen=True)
class LayerProblem:
    """Rows of one layer's input patches, with the float outputs they should give.

    Attributes:
        patches: (groups, R, K) the layer's input from the quantized prefix, before its own activation quantizer.
        targets: (groups, R, O) the float layer's outputs on the float inputs, O = C_out / groups, before its activation.
        weight: (groups, O, K) float.  bias: (groups, 1, O) float.
        fitted, held_out: int64 row numbers; rows of one input are never in both.
        activation: what follows the layer, elementwise.
        group: how many neighbouring inputs share a weight scale; None: all of a row.
        unknowns, equations: K, and the rows that the whole calibration set would give.
    """

    patches: Tensor
    targets: Tensor
    weight: Tensor
    bias: Tensor
    fitted: Tensor
    held_out: Tensor
    activation: Callable[[Tensor], Tensor]
    group: int | None = None

    @property
    def clipped(self) -> bool:
        """Whether the activation clips some target and does nothing else: what it returns, it returns unchanged."""
        clips = False
        for targets in torch.split(self.targets, rows_together(self.targets), 1):
            once = self.activation(targets)
            clips |= bool((once != targets).any())
            if not torch.equal(self.activation(once), once):
                return False
        return clips

    def error(self, inputs: Tensor, weight: Tensor, bias: Tensor, rows: Tensor) -> float:
        """Squared error after the activation, over that of the targets about their channel means or `SILENT` of their power
        before the activation, whichever is more: rows on which all channels are clipped have no variance.

        Args:
            inputs: like `patches`, on the activation grid.
        """
        return self._error(inputs[:, rows], self.targets[:, rows], weight, bias)

    def held_out_error(self, inputs: Tensor, weight: Tensor, bias: Tensor) -> float:
        """`error` on the held-out rows, whose inputs alone are given: (groups, H, K)."""
        return self._error(inputs, self.targets[:, self.held_out], weight, bias)

    @torch.no_grad()
    def _error(self, inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> float:
        target = self.activation(targets)
        output = self.activation(inputs @ weight.transpose(1, 2) + bias)
        power = (target - target.mean(1, keepdim=True)).square().mean(dtype=torch.float64)
        error = (output - target).square().mean(dtype=torch.float64)
        least = (SILENT * targets.square().mean(dtype=torch.float64)).clamp(min=CONSTANT)
        return (error / torch.maximum(power, least)).item()


def rows_together(values: Tensor) -> int:
    """How many rows of values (groups, R, K) an elementwise function gets at once: no copy of all of them is made."""
    return max(1, TOGETHER // values[:, 0].numel())


def sample_positions(
    count: int, available: int, sampled: int, generator: torch.Generator, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Random output positions of `count` inputs, int64 (count, sampled), none twice, and which of them count, bool.

    Args:
        available: output positions of one input.
        mask: bool (count, available), the positions that may be sampled; an input with fewer than `sampled` has all of them.
    """
    order = torch.rand(count, available, generator=generator)
    if mask is not None:
        order = order.masked_fill(~mask.cpu(), -1.0)
    found = order.topk(sampled, dim=1)
    return found.indices, found.values >= 0


def per_input(available: int, width: int, inputs: int) -> int:
    """How many output positions are sampled of each input."""
    return max(1, min(POSITIONS, available, LARGEST // max(1, width * inputs)))


def layer_problem(
    geometry: Geometry,
    weight: Tensor,
    bias: Tensor,
    activation: Callable[[Tensor], Tensor],
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    inputs: int,
    generator: torch.Generator,
    masks: Iterable[Tensor | None] = itertools.repeat(None),
    sizes: Iterable[int] | None = None,
) -> LayerProblem:
    """The problem of a layer, sampled from its values on all batches.

    Args:
        weight: (C_out, ...) float.  bias: (C_out,) float.
        pairs: per batch, the input from the quantized prefix and the float output before the activation.
        inputs: size of the calibration set.
        sizes: inputs of each batch, where they are not the rows of its values: a window of an image is a row of its own to
            some linear layers.
        masks: per batch, bool (N, positions), which of the positions may be sampled; None for all.
    """
    grouped = geometry.grouped(weight)
    groups, outputs, length = grouped.shape
    width = groups * (length + outputs)
    room = inputs * per_input(POSITIONS, width, inputs)
    patches, targets = weight.new_empty(groups, room, length), weight.new_empty(groups, room, outputs)

    def sampled(
        both: tuple[Tensor, Tensor], mask: Tensor | None, size: int | None
    ) -> tuple[int, Tensor, Tensor, Tensor]:
        """Of a batch: its rows, how many positions of each count, and the patches and outputs there."""
        x, output = both
        if geometry.kind == "linear" and size is not None and x.shape[0] > size and x.shape[0] % size == 0:
            x, output = x.reshape(size, -1, x.shape[-1]), output.reshape(size, -1, output.shape[-1])
        available = geometry.positions(output)
        usable = mask is not None and mask.shape == (x.shape[0], available) and mask.any(1).all()
        share = per_input(available, width, inputs)
        drawn, counts = sample_positions(x.shape[0], available, share, generator, mask if usable else None)
        positions, real = drawn.to(x.device), counts.flatten().nonzero()[:, 0].to(x.device)
        rows = geometry.channels_last(output)  # (N, positions, C_out)
        chosen = rows.gather(1, positions[:, :, None].expand(-1, -1, rows.shape[-1]))
        found = geometry.patches(x, weight, positions), chosen.reshape(-1, groups, outputs).transpose(0, 1)
        if len(real) < positions.numel():
            found = found[0][:, real], found[1][:, real]
        return x.shape[0], counts.sum(1), *found

    owners = []
    start = filled = 0
    for count, kept, some, outputs_there in map(
        sampled, pairs, masks, itertools.repeat(None) if sizes is None else sizes
    ):
        part = slice(filled, filled + some.shape[1])
        if part.stop > patches.shape[1]:  # rows that are no inputs
            patches, targets = (
                torch.cat([each, each.new_empty(groups, part.stop, each.shape[2])], 1) for each in (patches, targets)
            )
        patches[:, part], targets[:, part] = some, outputs_there
        owners.append(torch.arange(start, start + count).repeat_interleave(kept))
        start, filled = start + count, part.stop
    owner = torch.cat(owners).to(weight.device)
    last = owner >= start - held_out_count(start)
    everything = torch.arange(filled, device=weight.device)
    return LayerProblem(
        patches[:, :filled],
        targets[:, :filled],
        grouped,
        bias.reshape(groups, 1, -1),
        everything[~last],
        everything[last] if start > 1 else everything,
        activation,
    )


@dataclass(frozen=True)
class Grid:
    """An activation grid as numbers: scale and zero point (scalars), and the largest code."""

    scale: Tensor
    zero_point: Tensor
    qmax: int

    def quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero_point, 0, self.qmax)


@dataclass(frozen=True)
class Fit:
    """A layer as a solver leaves it.

    Attributes:
        codes: int8 (groups, O, K).  scale: (groups, O), or (1, O, G) for G groups of inputs.  bias: (groups, 1, O) float.
        grid: of the layer's input; None where the input is float.
        before, after: relative squared error on the held-out rows, of the start and of this fit.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor
    grid: Grid | None
    before: float
    after: float


def round_to_nearest(
    problem: LayerProblem,
    scale: Tensor,
    grid: Grid | None,
    bits: int,
    codes: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
) -> Fit:
    """The layer with its weights rounded to nearest on the given scales, or with the codes that it must have.

    The bias is the float one.

    Args:
        inputs: the held-out rows on the grid (groups, H, K), where the caller has them; the problem's patches are not read then.
    """
    qmin, qmax = weight_limits(bits)
    scale = scale.clamp(min=NEGLIGIBLE)
    codes = (
        (problem.weight / by_input(scale, problem.weight)).round().clamp(qmin, qmax) if codes is None else codes.float()
    )
    if inputs is None:
        x = problem.patches[:, problem.held_out]
        inputs = x if grid is None else grid.quantize(x)
    error = problem.held_out_error(inputs, codes * by_input(scale, codes), problem.bias)
    return Fit(codes.to(torch.int8), scale, problem.bias, grid, error, error)


@torch.no_grad()
def correct_bias(problem: LayerProblem, fit: Fit, rows: int = 4096) -> Fit:
    """The fit with the mean that its rounding adds to each channel, on up to `rows` fitted rows, taken off the bias.

    Against the float layer on the same inputs, not against the float network: means that the prefix has lost are no matter
    of a constant, and behind layer norms each one put back moves the others (docs/experiments.md).
    """
    chosen = problem.fitted[:: max(1, len(problem.fitted) // rows)]
    x, weight = problem.patches[:, chosen], fit.codes.float() * by_input(fit.scale, fit.codes)
    inputs = x if fit.grid is None else fit.grid.quantize(x)
    bias = problem.bias + (x @ problem.weight.mT - inputs @ weight.mT).mean(1, keepdim=True)
    x = problem.patches[:, problem.held_out]
    held_out = x if fit.grid is None else fit.grid.quantize(x)
    return replace(fit, bias=bias, after=problem.held_out_error(held_out, weight, bias))


def covariance(problem: LayerProblem, rows: int = 4096) -> Tensor:
    """H (groups, K, K): the centred second moments of the layer's input patches on up to `rows` fitted rows."""
    x = problem.patches[:, problem.fitted[:rows]]
    x = x - x.mean(1, keepdim=True)
    return x.transpose(1, 2) @ x / max(1, x.shape[1])


def output_error(problems: Iterable[LayerProblem], rows: int = 2048) -> Callable[[Tensor, Tensor, int], float]:
    """The relative error that an activation grid alone causes at the outputs of the layers that read it.

    Args:
        problems: of these layers; none is kept.  rows: of each that are looked at, at most.
    """

    def case(problem: LayerProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        available = problem.patches.shape[1]
        count = max(1, min(rows, available, SEARCHED // problem.patches[:, 0].numel()))
        spread = torch.linspace(0, available - 1, count)
        x, unit = problem.patches[:, spread.long()], binary_unit(problem.patches)
        # in a unit of the outputs, so that their squares stay inside float32
        weight = (problem.weight / binary_unit(problem.weight) / unit).transpose(1, 2)
        exact = x @ weight
        power = (exact - exact.mean(1, keepdim=True)).square().mean().clamp(min=CONSTANT)
        return x, exact, weight, power

    cases = list(map(case, problems))  # a loop's variable would keep each problem until the next one is there

    def error(scale: Tensor, zero_point: Tensor, qmax: int) -> float:
        total = 0.0
        for x, exact, weight, power in cases:
            output = fake_quantize(x, scale, zero_point, 0, qmax) @ weight
            total += ((output - exact).square().mean() / power).item()
        return total

    return error
