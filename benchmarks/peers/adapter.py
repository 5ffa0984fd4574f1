"""What every peer's adapter shares: its command line, its clock, its memory and the logits it leaves behind."""

import argparse
import importlib.metadata
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parents[3] / "shared"  # the zoo, whose classes the saved networks are of
BATCH = 64
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A float network, the calibration images (N, C, H, W) and what is asked of the tool."""

    network: str
    model: nn.Module
    calibration: Tensor
    bits: str
    seed: int

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """The calibration images in their order."""
        yield from torch.split(self.calibration, size)


@dataclass(frozen=True)
class Result:
    """What a tool made: its simulated network, where its grids lie and its settings, in words."""

    forward: Forward
    placement: str
    settings: str
    bytes: int | None = None  # of packed weights, where the tool chose the bits


Method = Callable[[Problem], Result]
COMMON = "common"


def main(packages: tuple[str, ...], methods: Mapping[str, Method]) -> None:
    """Runs one method on one problem; prints a row and writes the logits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="where networks and images were laid")
    parser.add_argument("--network", required=True)
    parser.add_argument("--bits", required=True)
    parser.add_argument("--method", required=True, choices=methods)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="calibration images; all by default")
    parser.add_argument("--output", type=Path, required=True, help="file of the logits, .npy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)
    random.seed(arguments.seed)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(SHARED))
    folder = arguments.folder / arguments.network
    model = torch.load(folder / "model.pt", weights_only=False).eval()
    calibration = torch.from_numpy(np.load(folder / "calibration.npy")[: arguments.images])
    problem = Problem(arguments.network, model, calibration, arguments.bits, arguments.seed)
    row = measure(problem, methods[arguments.method], np.load(folder / "test.npy", mmap_mode="r"), arguments.output)
    row["versions"] = {name: importlib.metadata.version(name) for name in (*packages, "torch")}
    print(json.dumps(row), file=sys.stdout, flush=True)


def measure(problem: Problem, method: Method, test: Any, output: Path) -> dict[str, Any]:
    """Seconds and peak memory of one call of `method`; the quantized network's logits go to `output`.

    Seconds are the process's on the processor: with one thread they are those of the clock on an idle machine, and they do not
    count what other programs took. The clock's are in `elapsed`.
    """
    list(forwards(problem.model, problem.calibration[:BATCH]))
    worked = time.process_time()
    list(forwards(problem.model, problem.calibration))
    float_pass = time.process_time() - worked
    before = reset_peak()
    started, worked = time.perf_counter(), time.process_time()
    result = method(problem)
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    peak = status("VmHWM") - before
    logits = [out for i in range(0, len(test), BATCH) for out in forwards(result.forward, tensor(test[i : i + BATCH]))]
    np.save(output, torch.cat(logits).float().numpy())
    return {
        "seconds": worked, "elapsed": seconds, "float_pass": float_pass, "passes": worked / float_pass, "peak": peak,
        "placement": result.placement, "settings": result.settings, "bytes": result.bytes,
        "calibration": len(problem.calibration), "threads": torch.get_num_threads(),
    }  # fmt: skip


def tensor(images: Any) -> Tensor:
    return torch.from_numpy(np.array(images))


@torch.no_grad()
def forwards(forward: Forward, images: Tensor) -> Iterator[Tensor]:
    yield from [forward(batch).detach() for batch in torch.split(images, BATCH)]


def reset_peak() -> int:
    """Resets this process's peak memory (Linux) and returns its resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
