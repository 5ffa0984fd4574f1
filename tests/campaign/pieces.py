"""Pieces of a run that are lost or damaged: the run that goes on must end as one that nothing had happened to.

python -m tests.campaign.pieces [--limit SECONDS]
"""

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import calque
from calque.quantized.model import QuantizedModel
from calque.recipe import ADVANCED, FAST, AdaQuant, Distillation, Parallel, Search, Tuning

Result = dict[str, Any]
FLIPS = (0.02, 0.5, 0.98)  # of a file's length: in its header, in the middle, at its end

SEARCH = replace(
    ADVANCED, name="search", fit=AdaQuant(steps=8), tuning=Tuning(steps=5),
    search=Search(AdaQuant(steps=5), priced_inputs=64, finalists=2),
)  # fmt: skip
SIZE = 6300  # bytes of the file: two bits everywhere take 6016
CASES: dict[str, dict[str, Any]] = {
    "sequential": {"bits": "w4a4", "recipe": FAST},
    "distilled": {
        "bits": "w4a4",
        "recipe": replace(FAST, name="distilled", distillation=Distillation(steps=3)),
    },
    "budget": {"bits": ("w8a8", "w4a4", "w2a4"), "budget": calque.Budget(size=SIZE), "recipe": FAST},
    "parallel": {
        "bits": ("w8a8", "w4a4", "w2a4"),
        "budget": calque.Budget(size=SIZE),
        "recipe": replace(SEARCH, flavour=Parallel()),
    },
}


class _KilledError(BaseException):
    """No Exception, so that nothing in between catches it."""


def network() -> nn.Module:
    """Four convolutions whose channel scales migrate, and a classifier."""
    generator = torch.Generator().manual_seed(0)
    widths = (1, 6, 6, 8, 8)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    result = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).eval()
    for tensor in result.state_dict().values():
        noise = torch.randn(tensor.shape, generator=generator)
        uneven = torch.exp(torch.randn(tensor.shape[0], generator=generator))  # so that scales have something to do
        tensor.copy_(noise / (tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 5.0))
        tensor.mul_(uneven.reshape(-1, *[1] * (tensor.dim() - 1)))
    return result


def inputs() -> Tensor:
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(case: str, run: Path | None) -> Result:
    """Everything of a run that two equal runs agree in."""
    return facts(calque.quantize(network(), inputs(), run=run, **CASES[case]))


def facts(q: QuantizedModel) -> Result:
    """Tensors, plan, prices, and the report without its times."""
    report = json.loads(q.report.to_json())
    del report["phases"]
    if report["distilled"] is not None:
        del report["distilled"]["seconds"]
    for layer in report["layers"]:
        del layer["seconds"]
    prices = None if q.prices is None else q.prices.to_json()
    return {"tensors": dict(q.state_dict()), "plan": q.plan.to_toml(), "prices": prices, "report": report}


def differences(one: Result, other: Result) -> list[str]:
    """What differs between two results."""
    mine, others = one["tensors"], other["tensors"]
    found = [
        name
        for name in sorted({*mine, *others})
        if name not in mine
        or name not in others
        or mine[name].dtype != others[name].dtype
        or not torch.equal(mine[name], others[name])
    ]
    return found + [name for name in ("plan", "prices", "report") if one[name] != other[name]]


@contextmanager
def ended_after(replacements: int) -> Iterator[None]:
    """Ends the program, as far as it can tell, once so many files were written; 0 lets it live."""
    move, left = os.replace, replacements

    def ending(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        nonlocal left
        move(source, target)
        left -= 1
        if left == 0:
            raise _KilledError

    os.replace = ending  # type: ignore[assignment]  # of the same use, without the keywords
    try:
        yield
    except _KilledError:
        pass
    finally:
        os.replace = move


def killed(case: str, run: Path, after: int) -> None:
    """Leaves in `run` what a run that was killed after so many files leaves; 0: all its pieces, but not its result."""
    with ended_after(after):
        quantized(case, run)
    for path in run.glob("result*.safetensors"):  # which would be returned as it is
        path.unlink()


def _removed(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _flipped(share: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1 << 2
        path.write_bytes(content)

    return flip


DAMAGES: dict[str, Callable[[Path], None]] = {
    "removed": _removed,
    "cut": _cut,
    "emptied": _emptied,
    **{f"flipped at {share:.0%}": _flipped(share) for share in FLIPS},
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One damage to one piece, and what then differed from the undisturbed run."""

    case: str
    piece: str
    damage: str
    wrong: tuple[str, ...]


def trials(case: str, folder: Path, *, after: int = 0, damages: tuple[str, ...] = tuple(DAMAGES)) -> Iterator[Trial]:
    """Every damage to every piece of a run.

    Args:
        folder: for the runs.
        after: how many files the run had written when it was killed; 0 for one whose pieces are all there.
    """
    expected, run = quantized(case, None), folder / "run"
    killed(case, run, after)
    for piece in sorted(run.rglob("*.safetensors")):
        for damage in damages:
            copy, name = folder / "copy", piece.relative_to(run)
            shutil.copytree(run, copy)
            DAMAGES[damage](copy / name)
            try:
                wrong = tuple(differences(quantized(case, copy), expected))
            except Exception as error:  # whatever it is, the run should have gone on
                wrong = (f"{type(error).__name__}: {error}",)
            yield Trial(case, str(name), damage, wrong)
            shutil.rmtree(copy)


def campaign(limit: float) -> tuple[Counter[tuple[str, bool]], list[Trial]]:
    """Trials of all cases, until so many seconds are spent: how many by case and whether right; and those that went wrong."""
    started, counts, wrong = time.monotonic(), Counter[tuple[str, bool]](), []
    for case, after in itertools.product(CASES, (4, 8, 0)):
        with tempfile.TemporaryDirectory() as folder:
            for trial in trials(case, Path(folder), after=after):
                counts[case, not trial.wrong] += 1
                wrong += [trial] if trial.wrong else []
                if time.monotonic() - started > limit:
                    return counts, wrong
    return counts, wrong


def main() -> None:
    """Prints the trials that went wrong, and counts of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    torch.set_num_threads(1)
    counts, found = campaign(parser.parse_args().limit)
    for trial in found:
        print(f"{trial.case}: {trial.piece} {trial.damage}: {', '.join(trial.wrong[:3])}")
    for case in CASES:
        right, wrong = counts[case, True], counts[case, False]
        print(f"{case}: tried {right + wrong}, right {right}, wrong {wrong}")


if __name__ == "__main__":
    main()
