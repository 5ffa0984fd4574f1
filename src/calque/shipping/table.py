"""A measured table of latencies: the time of each layer at each choice of bits, in ONNX Runtime on this processor."""

import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from calque.allocation.budget import HEADER
from calque.calibration.batches import prepare
from calque.errors import CalibrationError, SpecError
from calque.grid.bits import Bits
from calque.network.signature import flatten, rows, select
from calque.quantized.admission import require_quantized
from calque.quantized.model import QuantizedModel
from calque.quantized.partly import PartlyQuantized, whole_only
from calque.run.fields import shown, whole
from calque.run.files import write_whole
from calque.run.progress import Phase, Progress, check_progress, watched
from calque.shipping.alone import Alone, write_alone
from calque.shipping.latency import in_turns
from calque.shipping.onnx import export_onnx
from calque.shipping.runtimes import DEFAULT, OnnxRuntime
from calque.shipping.surroundings import Standing, alone, standings

MOST_THREADS, MOST_BATCH = 1024, 1_000_000
CANDIDATES = ("w8a8", "w4a8", "w4a4", "w2a4")
WARM_UP, LEAST_RUNS, MOST_RUNS, SECONDS = 5, 30, 300, 0.5  # of one layer
TRIES, NOISE = 3, 0.1  # a layer is measured again while the median absolute deviation is above this share of the median
LAYOUT = ("Transpose", "ReorderInput", "ReorderOutput")  # at a file's ends, where the network has none


@dataclass(frozen=True)
class LatencyTable(Mapping[tuple[str, str], float]):
    """Milliseconds of each (layer, bits), as `Budget(latency=(table, limit))` takes them.

    Attributes:
        entries: the times.
        deviations: median absolute deviation over median of each, the noise.
        plan: bits of the layers of the network that was given.
        network: milliseconds of that whole network.
    """

    entries: Mapping[tuple[str, str], float]
    deviations: Mapping[tuple[str, str], float]
    plan: Mapping[str, str]
    network: float

    def __getitem__(self, key: tuple[str, str]) -> float:
        return self.entries[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def total(self, plan: Mapping[str, object] | None = None) -> float:
        """The sum over the layers of a plan (layer -> bits), which a budget limits; by default of the plan that was given.

        Raises:
            KeyError: bits that were not measured.
        """
        layers = {name for name, _ in self.entries}
        return sum(self.entries[name, str(bits)] for name, bits in (plan or self.plan).items() if name in layers)

    @property
    def rest(self) -> float:
        """Milliseconds of the network that are no layer's: adds, pools, the ends, the call. Below 0 where layers overlap."""
        return self.network - self.total()

    def _everywhere(self, bits: str) -> bool:
        return all((layer, bits) in self.entries for layer, _ in self.entries)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as CSV: layer, bits, milliseconds."""
        with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows([layer, bits, f"{value:.6f}"] for (layer, bits), value in self.entries.items())
            file.seek(0)
            write_whole(Path(path), file.read().encode())

    def __str__(self) -> str:
        noisy = [f"{layer} {bits}" for (layer, bits), share in self.deviations.items() if share > NOISE]
        lines = [
            f"{len({layer for layer, _ in self.entries})} layers, {len(self.entries)} entries",
            f"the network as it is: {self.network:.3g} ms; its layers: {self.total():.3g} ms; the rest, in no entry: "
            f"{self.rest:.3g} ms",
        ]
        layers = {layer for layer, _ in self.entries}
        widest = dict.fromkeys(bits for _, bits in self.entries)
        sums = [f"{bits} {self.total(dict.fromkeys(layers, bits)):.3g}" for bits in widest if self._everywhere(bits)]
        lines.append(
            f"the layers' sum with the same bits everywhere, ms: {', '.join(sums) or 'no layers have the same'}"
        )
        if noisy:
            lines.append(
                f"note: {len(noisy)} entries are noisy, their median absolute deviation is above {NOISE:.0%} "
                f"({', '.join(noisy[:3])}{', ...' if len(noisy) > 3 else ''}): measure again on a quiet machine."
            )
        return "\n".join(lines)


def latency_table(
    model: QuantizedModel,
    inputs: object,
    *,
    bits: Sequence[str] | None = None,
    threads: int = 1,
    batch: int = 1,
    progress: Progress | bool | None = None,
) -> LatencyTable:
    """The time of each layer of `model` at each choice of bits, in default sessions of ONNX Runtime on this processor.

    A layer's time is that of its kernels in a file of the layer alone, at its size in the network: the layer with the
    requantization of its result, and what the choice puts in front of it (a quantizer of real numbers, a grid of its own where
    others read the same tensor, the bound of codes below 8 bits). Layers and choices that execute the same are measured once,
    so that noise is no reason for a choice.

    Args:
        model: a network quantized in whatever way; the recipe "nearest" is enough. Where activations have grids in it, they
            are taken to have them under a budget. Its own bits are measured, too.
        inputs: as the calibration inputs of `calque.quantize`; the first rows give the sizes.
        bits: the choices, as of `calque.quantize`; CANDIDATES by default.
        threads: of a session.
        batch: rows of an input.
        progress: as of `calque.quantize`; a function is called with ("latency", measured, in all).

    Raises:
        SpecError: no bits, bits that are none, threads or batch below 1, or more rows than the first batch has; a network
            quantized in parts.
        CalibrationError: inputs that are empty, not finite or of the wrong form, or that the network fails on.
        VerificationError, ExportError: ONNX Runtime cannot run the network.
    """
    check_progress(progress)
    require_quantized(model, "latency_table(q, inputs)")
    if isinstance(model, PartlyQuantized):
        raise whole_only(model, "latency_table", "latency_table(q.parts[path], inputs)")
    for name, value in {"threads": threads, "batch": batch}.items():
        whole(1, MOST_THREADS if name == "threads" else MOST_BATCH)(name, value)
    if bits is not None and not isinstance(bits, (list, tuple)):
        raise SpecError(f'bits are a tuple of choices of layers, such as ("w8a8", "w4a4"). Got {shown(bits)}.')
    choices = [Bits.parse(text) for text in (CANDIDATES if bits is None else bits)]
    if not choices or any(choice.weight is None and choice.activation is not None for choice in choices):
        raise SpecError(f'bits are a tuple of choices of layers, such as ("w8a8", "w4a4"). Got {shown(bits)}.')
    given = prepare(inputs, model.signature, next(iter(model.buffers())).device)[0]
    if rows(given) < batch:
        raise SpecError(f"batch is at most the rows of the first batch of inputs, {rows(given)}. Got {batch}.")
    leaves, _ = flatten(select(given, torch.arange(batch)))
    try:
        found = standings(model, leaves)
    except Exception as error:  # whatever operators raise on other shapes and types
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CalibrationError(
            f"the network fails on these inputs: {reason}. Pass inputs as its calibration had."
        ) from error
    cases = {
        (standing.name, str(choice)): alone(standing, choice)
        for standing in found
        for choice in _choices_of(standing, choices)
    }
    times: dict[Alone, tuple[float, float]] = {}
    distinct = dict.fromkeys(cases.values())
    with watched(progress) as watch:
        watch.expect([Phase("latency", (1.0,) * len(distinct))])
        for done, case in enumerate(distinct, 1):
            times[case] = _measured(case, threads)
            watch("latency", done, len(distinct))
    return LatencyTable(
        {key: times[case][0] for key, case in cases.items()}, {key: times[case][1] for key, case in cases.items()},
        {standing.name: str(standing.bits) for standing in found}, _whole(model, leaves, threads),
    )  # fmt: skip


def _choices_of(standing: Standing, choices: Sequence[Bits]) -> list[Bits]:
    """What a run may give this layer: the choices as far as they suit it, without activations where it has none; its own bits."""
    found = []
    for choice in choices:
        suited = [choice, Bits(choice.weight, choice.activation)]
        if not standing.takes_groups(choice.group):
            suited = suited[1:]
        if standing.bits.activation is None:
            suited.append(Bits(choice.weight, None))
        if standing.is_table:
            suited = [Bits(choice.weight, None)]
        found += suited
    return list(dict.fromkeys([*found, standing.bits]))


def _whole(model: QuantizedModel, leaves: Sequence[Any], threads: int) -> float:
    """Milliseconds of the exported network in a default session."""
    with tempfile.TemporaryDirectory(prefix="calque-") as folder:
        proto = onnx.load(export_onnx(model, Path(folder) / "model.onnx"))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    runtime = OnnxRuntime(proto, threads, settings=DEFAULT)
    return in_turns([lambda: runtime.run(tensors)])[0][0]


def _measured(case: Alone, threads: int) -> tuple[float, float]:
    """The median time in milliseconds and its median absolute deviation over it, the least of a few tries."""
    proto, feeds = write_alone(case)
    tries = []
    for _ in range(TRIES):
        times = _kernel_times(proto, feeds, threads)
        median = statistics.median(times)
        deviation = statistics.median(abs(time - median) for time in times)
        tries.append((deviation / median if median else 0.0, median))
        if tries[-1][0] <= NOISE:
            break
    share, median = min(tries)
    return median, share


def _kernel_times(proto: onnx.ModelProto, feeds: dict[str, NDArray[Any]], threads: int) -> list[float]:
    """Milliseconds of all kernels together but those that change the layout, of one run after the other, by the profiler."""
    with tempfile.TemporaryDirectory(prefix="calque-") as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        started = time.perf_counter()
        for _ in range(WARM_UP):
            session.run(None, feeds)
        once = (time.perf_counter() - started) / WARM_UP
        runs = max(LEAST_RUNS, min(MOST_RUNS, int(SECONDS / once)))
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels: dict[str, list[float]] = {}
    for event in events:
        is_kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and event["args"]["op_name"] not in LAYOUT:
            kernels.setdefault(event["name"], []).append(event["dur"] / 1000)  # microseconds
    return [sum(times) for times in zip(*kernels.values(), strict=True)][-runs:]
