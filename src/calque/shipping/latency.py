"""Latency of an exported file beside the float network's, in one runtime, measured in turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx
from torch import Tensor

from calque.shipping.runtimes import DEFAULT, OnnxRuntime, Runtime, Target, open_runtime

RUNS = 30
SECONDS = 20.0  # fewer runs where these would take longer


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians over interleaved runs on one input, in sessions as a user opens them.

    Attributes:
        milliseconds, float_milliseconds: of the quantized and of the float network.
        load_seconds, float_load_seconds: to load the files, decoding of packed weights included.
        runs: of each.
        exact_milliseconds: of the quantized network in a session with exact products; None where the default one has them.
        exact_settings: what such a session is given, "key = value" each.
    """

    milliseconds: float
    float_milliseconds: float
    load_seconds: float
    float_load_seconds: float
    runs: int
    exact_milliseconds: float | None = None
    exact_settings: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Of the quantized to the float network: below 1 is faster."""
        return self.milliseconds / self.float_milliseconds

    @property
    def exact_ratio(self) -> float | None:
        """The same with exact products; None where the default session has them."""
        return None if self.exact_milliseconds is None else self.exact_milliseconds / self.float_milliseconds

    def __str__(self) -> str:
        lines = [
            f"latency: {self.milliseconds:.3g} ms, {self.ratio:.2f} of float32's {self.float_milliseconds:.3g} ms "
            f"(default sessions, {self.runs} runs in turns); loaded in {self.load_seconds:.2g} s "
            f"(float32 {self.float_load_seconds:.2g} s)"
        ]
        if self.exact_milliseconds is not None:
            lines.append(
                f"latency with exact products: {self.exact_milliseconds:.3g} ms, {self.exact_ratio:.2f} of float32's "
                f"({', '.join(self.exact_settings)})"
            )
        return "\n".join(lines)


def measure_latency(
    proto: onnx.ModelProto,
    original: onnx.ModelProto,
    leaves: Sequence[Tensor],
    target: Target,
    threads: int | None = None,
    *,
    exact: Mapping[str, str] = DEFAULT,
) -> Latency:
    """A file and the float network's, run in turns on the flat inputs `leaves`, in sessions as a user opens them.

    Args:
        threads: as many as the runtime takes by default.
        exact: what a session of ONNX Runtime must be given for exact products; where that is something, such a session is
            measured as well.
    """
    cases = [(proto, DEFAULT), (original, DEFAULT), *([(proto, exact)] if exact else [])]
    opened = [_opened(file, target, threads, settings) for file, settings in cases]
    (mine, theirs, *others), runs = in_turns([partial(runtime.run, leaves) for runtime, _ in opened])
    return Latency(
        mine, theirs, opened[0][1], opened[1][1], runs, others[0] if others else None,
        tuple(f"{key} = {value}" for key, value in exact.items()),
    )  # fmt: skip


def _opened(
    proto: onnx.ModelProto, target: Target, threads: int | None, settings: Mapping[str, str]
) -> tuple[Runtime, float]:
    started = time.perf_counter()
    runtime = (
        OnnxRuntime(proto, threads, settings=settings)
        if target == "onnxruntime"
        else open_runtime(proto, target, threads)
    )
    return runtime, time.perf_counter() - started


def in_turns(calls: Sequence[Callable[[], object]]) -> tuple[list[float], int]:
    """The median milliseconds of each call, run in turns after one turn that warms up, and the number of turns."""
    for call in calls:
        call()
    once = sum(_milliseconds(call) for call in calls) / 1000
    runs = max(3, min(RUNS, int(SECONDS / max(once, 1e-6))))
    turns = [[_milliseconds(call) for call in calls] for _ in range(runs)]
    return [statistics.median(times) for times in zip(*turns, strict=True)], runs


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)
