"""Latency of an exported file beside the float network's, in one runtime, measured in turns."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from torch import Tensor

from calque.export.runtimes import Runtime, Target, open_runtime

RUNS = 30
SECONDS = 20.0  # fewer runs where these would take longer


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians over interleaved runs on one input.

    Attributes:
        milliseconds, float_milliseconds: of the quantized and of the float network.
        load_seconds, float_load_seconds: to load the files, decoding of packed weights included.
        runs: of each.
    """

    milliseconds: float
    float_milliseconds: float
    load_seconds: float
    float_load_seconds: float
    runs: int

    @property
    def ratio(self) -> float:
        """Of the quantized to the float network: below 1 is faster."""
        return self.milliseconds / self.float_milliseconds

    def __str__(self) -> str:
        return (
            f"latency: {self.milliseconds:.3g} ms, {self.ratio:.2f} of float32's {self.float_milliseconds:.3g} ms "
            f"({self.runs} runs in turns); loaded in {self.load_seconds:.2g} s (float32 {self.float_load_seconds:.2g} s)"
        )


def measure_latency(
    proto: onnx.ModelProto,
    original: onnx.ModelProto,
    leaves: Sequence[Tensor],
    target: Target,
    threads: int | None = None,
) -> Latency:
    """A file and the float network's, run in turns on the flat inputs `leaves`.

    Args:
        threads: as many as the runtime takes by default.
    """
    quantized, load = _opened(proto, target, threads)
    plain, float_load = _opened(original, target, threads)
    for runtime in (quantized, plain):
        runtime.run(leaves)
    once = sum(_milliseconds(runtime, leaves) for runtime in (quantized, plain)) / 1000
    runs = max(3, min(RUNS, int(SECONDS / max(once, 1e-6))))
    pairs = [(_milliseconds(quantized, leaves), _milliseconds(plain, leaves)) for _ in range(runs)]
    mine, theirs = zip(*pairs, strict=True)
    return Latency(statistics.median(mine), statistics.median(theirs), load, float_load, runs)


def _opened(proto: onnx.ModelProto, target: Target, threads: int | None) -> tuple[Runtime, float]:
    started = time.perf_counter()
    runtime = open_runtime(proto, target, threads)
    return runtime, time.perf_counter() - started


def _milliseconds(runtime: Runtime, leaves: Sequence[Tensor]) -> float:
    started = time.perf_counter()
    runtime.run(leaves)
    return 1000 * (time.perf_counter() - started)
