"""A network that cannot be captured whole: its largest sub-modules that can be are quantized in place, one after the other.

Control flow on data, or an operator that cannot be traced, costs the module that it stands in, and the modules around it.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from calque.calibration.fidelity import Pair, fidelity
from calque.calibration.holdout import held_out_count
from calque.errors import CalibrationError, CaptureError, SpecError
from calque.gains import Fidelity
from calque.grid.bits import Bits
from calque.network import Batch, Network, Signature, capture
from calque.network.batching import find_layout
from calque.network.copies import private_copy
from calque.network.outputs import flatten_outputs
from calque.network.paths import leaf_paths, output_names
from calque.network.rewrites.functional import silent_tracing
from calque.network.signature import laid_out, rows, select
from calque.quantized.model import QuantizedModel
from calque.quantized.partly import PartlyQuantized
from calque.report import Report
from calque.run.fields import shown

log = logging.getLogger(__name__)

Quantize = Callable[[nn.Module, list[Batch], Mapping[str, str | None]], QuantizedModel]
"""A part, its inputs and the bits of single layers -> the quantized part."""


@dataclass(frozen=True)
class _Part:
    path: str
    network: Network


def quantize_parts(
    model: nn.Module,
    calibration: list[Batch],
    quantize: Quantize,
    reason: CaptureError,
    *,
    override: Mapping[str, str | None],
    ends: str | None,
    notes: Sequence[str],
    on_part: Callable[[int, int], None],
) -> PartlyQuantized:
    """The network with its largest capturable sub-modules quantized, each on inputs from the parts before it.

    Args:
        calibration: batches by argument name.
        quantize: of one part.
        reason: why the whole network could not be captured.
        override: pattern of full names -> bits.  ends: bits of the first and the last layer of all parts; None: nothing special.
        notes: what the report says of the inputs.
        on_part: called before each part, with the parts done and the parts in all.

    Raises:
        CaptureError: `reason`, where no sub-module with layers can be captured either.
        SpecError: a pattern that matches nothing.
    """
    work = private_copy(model)
    judged = _last(calibration)
    exact = _outputs(work, judged)
    skipped: list[str] = []
    found = list(_capturable(work, "", calibration, skipped))
    if not found:
        raise reason
    chosen = _overrides(found, override, ends)
    parts: dict[str, QuantizedModel] = {}
    for number, part in enumerate(found):
        on_part(number, len(found))
        inputs = _inputs_of(work, part.path, calibration)
        parts[part.path] = quantize(work.get_submodule(part.path), inputs, chosen[part.path])
        work.set_submodule(part.path, parts[part.path])
        log.info("part %s quantized: %d layers", part.path, len(parts[part.path].layers))
    notes = [
        *notes,
        f"the network cannot be captured whole; its parts are quantized in place: {', '.join(parts)}. {reason}",
        *skipped,
    ]
    unseen = held_out_count(sum(map(rows, calibration)), least=0) > 0 and all(_unseen(part) for part in parts.values())
    lost = _fidelity(judged, exact, _outputs(work, judged), held_out=unseen)
    return PartlyQuantized(work, parts, replace(_joined(work, parts, notes), fidelity=lost))


def _capturable(model: nn.Module, path: str, calibration: list[Batch], skipped: list[str]) -> Iterator[_Part]:
    """The largest sub-modules below `path` that can be captured and have layers, in the order of registration."""
    for name, child in model.get_submodule(path).named_children():
        where = f"{path}.{name}" if path else name
        if not any(True for _ in child.parameters()):
            continue
        if isinstance(child, nn.RNNBase):
            skipped.append(f"module {where} ({type(child).__name__}) stays float.")
            continue
        inputs = _inputs_of(model, where, calibration[:1]) or _inputs_of(model, where, calibration)
        network, leaf = None, not any(True for _ in child.children())
        if not inputs and leaf:
            skipped.append(f"module {where} is never called on these inputs; it stays float.")
        if inputs:
            try:
                network = capture(child, laid_out(inputs[0], find_layout(child, inputs)))
            except (CaptureError, CalibrationError) as error:
                if leaf:
                    skipped.append(f"module {where} stays float: {error}")
        if network is None:
            if isinstance(
                child, nn.TransformerEncoder
            ):  # its shortcut hands its layers nested tensors, which no part takes
                child.use_nested_tensor = False
                skipped.append(
                    f"padded places of {where} are computed, where torch's shortcut in eval mode leaves zeros."
                )
            yield from _capturable(model, where, calibration, skipped)
        elif network.layers:
            yield _Part(where, network)


@torch.no_grad()
def _inputs_of(model: nn.Module, path: str, calibration: list[Batch]) -> list[Batch]:
    """What a sub-module is called with while the network runs on all batches, by argument name; a batch for each call."""
    module = model.get_submodule(path)
    found: list[Batch] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(copy.copy(signature.bind(args, kwargs)))

    try:
        signature = Signature.of(module)
    except CaptureError:
        return []
    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with silent_tracing():
            for batch in calibration:
                model(**batch)
    except CalibrationError:  # a call whose arguments have no names
        return []
    finally:
        handle.remove()
    return found


def _last(calibration: list[Batch]) -> list[Batch]:
    """The last fifth of the inputs, which no part's fits are fitted to; all of them where there are fewer than five."""
    total = sum(map(rows, calibration))
    room = held_out_count(total, least=0) or total
    found: list[Batch] = []
    for batch in reversed(calibration):
        count = min(rows(batch), room)
        if count:
            found.insert(0, select(batch, torch.arange(rows(batch) - count, rows(batch))))
        room -= count
    return found


@torch.no_grad()
def _outputs(model: nn.Module, batches: list[Batch]) -> list[tuple[list[Any], Any]] | None:
    """The output leaves and their tree on each batch; None where forward returns what has no leaves."""
    with silent_tracing():
        results = [model(**batch) for batch in batches]
    try:
        return [flatten_outputs(result) for result in results]
    except TypeError:
        return None


def _unseen(part: QuantizedModel) -> bool:
    """Whether a part's fits were not fitted to the last fifth of its inputs."""
    found: Fidelity | None = part.report.fidelity
    return found is None or found.held_out


def _fidelity(
    judged: list[Batch],
    exact: list[tuple[list[Any], Any]] | None,
    found: list[tuple[list[Any], Any]] | None,
    *,
    held_out: bool,
) -> Fidelity | None:
    """What quantization cost the whole network; None where the forms of its outputs depend on values."""
    if exact is None or found is None or any(a[1] != b[1] for a, b in zip(exact, found, strict=True)):
        return None
    pairs: list[Pair] = [(rows(batch), a[0], b[0]) for batch, a, b in zip(judged, exact, found, strict=True)]
    return fidelity(pairs, output_names(leaf_paths(exact[0][1])), held_out=held_out)


def _overrides(
    found: Sequence[_Part], override: Mapping[str, str | None], ends: str | None
) -> dict[str, dict[str, str | None]]:
    """By part, the bits of single layers and tensors: those of the ends, then of the patterns."""
    names = {
        f"{part.path}.{name}": (part.path, name)
        for part in found
        for name in (*part.network.layers, *part.network.products)
    }
    result: dict[str, dict[str, str | None]] = {part.path: {} for part in found}
    if ends is not None:
        multiplying = [
            (part.path, name) for part in found for name in part.network.layers if not part.network.is_table(name)
        ]
        for path, name in {*multiplying[:1], *multiplying[-1:]}:
            result[path][name] = ends
    for pattern, text in override.items():
        matched = [full for full in names if fnmatchcase(full, pattern)]
        if not matched:
            raise SpecError(
                f"override pattern {shown(pattern)} matches no layer of a part. The names are: {', '.join(names)}."
            )
        for full in matched:
            path, name = names[full]
            is_layer = name in next(part for part in found if part.path == path).network.layers
            if text is None or (Bits.parse(text).weight is not None) == is_layer:
                result[path][name] = text
    return result


def _joined(model: nn.Module, parts: Mapping[str, QuantizedModel], notes: list[str]) -> Report:
    """One report of all parts."""
    reports: dict[str, Report] = {path: part.report for path, part in parts.items()}
    first = next(iter(reports.values()))
    inside = {id(value) for part in parts.values() for value in (*part.parameters(), *part.buffers())}
    outside = sum(value.numel() for value in model.parameters() if id(value) not in inside)
    phases: dict[str, float] = {}
    for report in reports.values():
        for name, seconds in report.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
    own = [f"part {path}: {note}" for path, report in reports.items() for note in report.notes]
    return replace(
        first,
        layers=tuple(replace(layer, name=f"{path}.{layer.name}") for path, r in reports.items() for layer in r.layers),
        tensors={f"{path}.{name}": grid for path, r in reports.items() for name, grid in r.tensors.items()},
        float_size=sum(report.float_size for report in reports.values()) + 4 * outside,
        other_size=sum(report.other_size for report in reports.values()) + 4 * outside,
        phases=phases, notes=(*notes, *own), finalists=(), tuned=None, distilled=None,
        file_size=None, file_limit=None,
    )  # fmt: skip
