"""What the outputs of an exported file have in common with the exact integer evaluation, counted batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calque.errors import VerificationError
from calque.network import Batch, WeightedLayer
from calque.network.signature import flatten, rows
from calque.quantized.model import QuantizedModel
from calque.shipping.runtimes import Runtime
from calque.shipping.verification import EDGES, LIMIT_DB, LOOSE, Agreement, Kind, OutputAgreement

LEVELS = 256  # an output without a grid is judged as if it had these steps in one standard deviation
FEW = 16  # values that say nothing about a spread
ROUNDING = 2.0**-16  # of the largest value: a chain of float32 kernels and long sums lose up to 8 of its 24 bits
CONSTANT = 2.0**-15  # a standard deviation below this share of the root mean square may be rounding


@dataclass(frozen=True, slots=True)
class _Output:
    """One output of the network on one batch; `step` and `spread` broadcast against it."""

    kind: Kind
    exact: Tensor
    simulated: Tensor
    step: Tensor
    spread: Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """One batch as the network evaluates it: the outputs that the file has, too, and the codes of every edge."""

    rows: int
    outputs: list[_Output]
    codes: dict[str, Tensor]


def agreements(
    runtimes: Sequence[Runtime],
    model: QuantizedModel,
    batches: Sequence[Batch],
    names: Sequence[str],
    edges: Sequence[str],
) -> list[Agreement]:
    """Of each runtime with the exact evaluation and the simulation, which run once for all of them.

    Args:
        names: of the file's outputs.
        edges: whose codes the runtimes return behind the outputs, of the network's those that the file has.

    Raises:
        VerificationError: a runtime cannot run the file; outputs of another number or shape than the network's.
    """
    counts = [_FileCount(names, edges, exact=not _quantized_at_load(model)) for _ in runtimes]
    for batch in batches:
        leaves = [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]
        evaluated = _evaluated(model, leaves, rows(batch), names)
        for runtime, count in zip(runtimes, counts, strict=True):
            count.add(runtime.run(leaves), evaluated)
    return [count.agreement() for count in counts]


def _quantized_at_load(model: QuantizedModel) -> bool:
    """Whether there are layers on float inputs: between two quantizers, ONNX Runtime quantizes their weights itself."""
    left = any(isinstance(module, WeightedLayer) for module in model.graph_module.modules())
    alone = any(layer.bias_scale is None and layer.geometry.kind != "embedding" for layer in model.layers.values())
    return left or alone


@torch.no_grad()
def _evaluated(model: QuantizedModel, leaves: list[Tensor], count: int, names: Sequence[str]) -> _Batch:
    exact, codes, steps = model.integer().trace(*leaves)
    simulated = model.evaluate(*leaves)
    outputs = []
    for index in _shared(exact, names):
        values = torch.as_tensor(exact[index]).cpu()
        spread, step = spread_of(values), steps[index]
        step = spread / LEVELS if step is None else step.cpu().double()
        outputs.append(_Output(_kind(values, count), values, torch.as_tensor(simulated[index]).cpu(), step, spread))
    return _Batch(count, outputs, {name: value.cpu() for name, value in codes.items()})


def _shared(outputs: Sequence[object], names: Sequence[str]) -> list[int]:
    """Which outputs of the network are in the file: all but None; constants that are no tensors may be left out, too."""
    numbers = [index for index, output in enumerate(outputs) if output is not None]
    tensors = [index for index in numbers if isinstance(outputs[index], Tensor)]
    for kept in (numbers, tensors):
        if len(kept) == len(names):
            return kept
    raise VerificationError(
        f"the file has {len(names)} outputs ({', '.join(names)}), the network {len(tensors)}. Is the file of this network?"
    )


def spread_of(values: Tensor) -> Tensor:
    """The standard deviation of an output, float64: of the whole, or where that is less, of a slice behind axis 0.

    Channels, and boxes beside scores, are slices; it broadcasts against the output. Of constants it is their size, of whole
    numbers nothing is read.
    """
    values = values.double()
    spread = _spread(values.reshape(1, -1)).reshape([1] * values.dim())
    for axis in range(1, values.dim()):
        if values.numel() >= FEW * max(1, values.shape[axis]):
            shape = [-1 if other == axis else 1 for other in range(values.dim())]
            spread = torch.minimum(spread, _spread(values.transpose(0, axis).flatten(1)).reshape(shape))
    return spread


def _spread(values: Tensor) -> Tensor:
    """The standard deviation of the finite values of each row; of constants, their size."""
    finite = values.isfinite()
    count = finite.sum(1).clamp(min=1)
    kept = values.where(finite, torch.zeros_like(values))
    power = kept.square().sum(1) / count
    return _signal(power, kept.sum(1) / count).sqrt()


def _signal(power: Tensor, mean: Tensor) -> Tensor:
    """The variance; the mean square where the values are constant but for rounding."""
    variance = (power - mean.square()).clamp(min=0)
    return torch.where(variance <= CONSTANT**2 * power, power, variance)


class _FileCount:
    """What one runtime returns, beside the network."""

    def __init__(self, names: Sequence[str], edges: Sequence[str], *, exact: bool):
        self.outputs = [_OutputCount(name) for name in names]
        self.edges = edges
        self.exact = exact  # codes part at rounding edges alone
        self.codes, self.wrong = dict.fromkeys(edges, 0), dict.fromkeys(edges, 0)

    def add(self, received: list[Tensor], batch: _Batch) -> None:
        """Counts one batch; the codes of the edges are the last outputs."""
        number = len(self.outputs)
        same = torch.ones(batch.rows, dtype=torch.bool)  # rows whose codes are the exact ones in every tensor
        for name, codes in zip(self.edges, received[number:], strict=True):
            apart = _apart(batch.codes[name], codes)
            self.codes[name] += apart.numel()
            self.wrong[name] += int(apart.sum())
            same &= ~(apart.reshape(batch.rows, -1).any(1) if apart.shape[:1] == same.shape else apart.any())
        for count, found, output in zip(self.outputs, received[:number], batch.outputs, strict=True):
            count.add(found, output, same if len(self.edges) == len(batch.codes) else None)

    def agreement(self) -> Agreement:
        parted = next((name for name in self.edges if self.wrong[name]), "")
        share = self.wrong[parted] / self.codes[parted] if parted else 0.0
        explained = bool(parted) and (share <= EDGES or not self.exact)
        outputs = tuple(count.agreement(explained=explained) for count in self.outputs)
        return Agreement(outputs, len(self.edges), parted, share)


def _apart(expected: Tensor, received: Tensor) -> Tensor:
    """Where codes differ; everywhere, if there are more or fewer of them."""
    if expected.numel() != received.numel():
        return torch.ones_like(expected, dtype=torch.bool)
    return expected != received.reshape(expected.shape)


class _OutputCount:
    """One output of a file."""

    def __init__(self, name: str):
        self.name = name
        self.kind: Kind | None = None
        self.units, self.strict, self.nearly, self.simulated = 0, 0, 0, 0
        self.values, self.steps, self.largest, self.noise = 0, 0.0, 0.0, 0.0
        self.finite, self.total, self.power = 0, 0.0, 0.0  # of the exact output

    def add(self, received: Tensor, output: _Output, same: Tensor | None) -> None:
        """Counts one batch; `same` (N,): rows whose codes are the exact ones in every tensor, None where not all are known."""
        if received.shape != output.exact.shape:
            raise VerificationError(
                f"output {self.name} has the shape {tuple(received.shape)} in the file and {tuple(output.exact.shape)} in the "
                "network. Is the file of this network?"
            )
        self.kind = self.kind or output.kind
        if self.kind == "whole numbers":
            equal = output.exact == received
            self._vote(equal if same is None else equal & _along(same, equal), equal, output.simulated == received)
            return
        received, exact, simulated = (value.double() for value in (received, output.exact, output.simulated))
        tolerance = torch.clamp(output.step / 2, min=ROUNDING * _peak(exact)).expand_as(exact)
        error = _error(received, exact)
        close = error <= tolerance
        if self.kind == "class scores":
            top = _same_class(received, exact, tolerance)
            strict, nearly = (top, top) if same is None else (top & close.all(1), top & (close.all(1) | ~same))
            self._vote(strict, nearly, _same_class(received, simulated, tolerance))
        else:
            loose = error <= LOOSE * output.spread
            nearly = close if same is None else close | loose & ~_along(same, exact)
            self._vote(close, nearly, _error(received, simulated) <= tolerance)
        self._measure(error, exact, output.step)

    def _vote(self, strict: Tensor, nearly: Tensor, simulated: Tensor) -> None:
        self.units += strict.numel()
        self.strict += int(strict.sum())
        self.nearly += int(nearly.sum())
        self.simulated += int(simulated.sum())

    def _measure(self, error: Tensor, exact: Tensor, step: Tensor) -> None:
        finite = exact[exact.isfinite()]
        self.finite += finite.numel()
        self.total += finite.sum().item()
        self.power += finite.square().sum().item()
        self.noise += error.square().sum().item()
        steps = torch.where(error == 0, error, error / step)
        self.values += steps.numel()
        self.steps += steps.sum().item()
        self.largest = max(self.largest, steps.max().item() if steps.numel() else 0.0)

    def agreement(self, *, explained: bool) -> OutputAgreement:
        """The figures; `explained`: codes part, and as they do where float kernels meet rounding edges."""
        assert self.kind is not None
        exact, simulated = 1.0, 1.0  # of an output without values
        if self.units:
            exact, simulated = (self.nearly if explained else self.strict) / self.units, self.simulated / self.units
        if self.kind == "whole numbers":
            return OutputAgreement(self.name, self.kind, exact, simulated, None, None, None)
        mean = self.steps / max(1, self.values)
        return OutputAgreement(self.name, self.kind, exact, simulated, self._decibels(), mean, self.largest)

    def _decibels(self) -> float:
        if self.noise == 0:
            return LIMIT_DB
        power, mean = (
            torch.tensor(total / max(1, self.finite), dtype=torch.float64) for total in (self.power, self.total)
        )
        ratio = _signal(power, mean) * self.values / self.noise
        return float((10 * ratio.log10()).clamp(-LIMIT_DB, LIMIT_DB))


def _kind(exact: Tensor, count: int) -> Kind:
    """Class scores are real numbers (N, C) of two classes or more."""
    if not exact.is_floating_point():
        return "whole numbers"
    return "class scores" if exact.dim() == 2 and len(exact) == count and exact.shape[1] > 1 else "values"


def _along(same: Tensor, values: Tensor) -> Tensor:
    """Facts of rows as they broadcast against an output; for one whose axis 0 is not the batch, whether all hold."""
    if values.shape[:1] == same.shape:
        return same.reshape(-1, *[1] * (values.dim() - 1))
    return same.all()


def _peak(values: Tensor) -> float:
    """The largest finite size."""
    finite = values[values.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _error(received: Tensor, expected: Tensor) -> Tensor:
    """The distance of each value; 0 where both are the same infinity or no number, infinite where only one is."""
    same = (received == expected) | (received.isnan() & expected.isnan())
    error = (received - expected).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return error.masked_fill(same, 0.0)


def _same_class(received: Tensor, expected: Tensor, tolerance: Tensor) -> Tensor:
    """Rows (N,) whose highest score is the highest of `expected`, too, or ties with it within the tolerance."""
    picked = received.argmax(1, keepdim=True)
    behind = expected.amax(1, keepdim=True) - expected.gather(1, picked)
    tie = behind <= tolerance.gather(1, picked)
    return ((picked == expected.argmax(1, keepdim=True)) | tie).squeeze(1)
