"""Runs an exported file in a runtime and compares it with the quantized network it was made from."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from calque.calibration.batches import prepare
from calque.errors import CalibrationError, CaptureError, SpecError, VerificationError
from calque.grid.bits import BOUND
from calque.network import Batch
from calque.network.signature import flatten, rows, select
from calque.network.surroundings import undisturbed
from calque.quantized.admission import file_to_read, require_call, require_original, require_quantized
from calque.quantized.model import QuantizedModel
from calque.quantized.partly import PartlyQuantized, whole_only
from calque.run.fields import shown
from calque.shipping.agreement import agreements
from calque.shipping.feeds import feeds_of
from calque.shipping.identity import differences, unknown_origin
from calque.shipping.latency import measure_latency
from calque.shipping.onnx import float_onnx
from calque.shipping.runtimes import (
    EXACT,
    LEVEL,
    PACKED,
    PRECISE,
    Kernel,
    OnnxRuntime,
    Runtime,
    Target,
    check_target,
    open_runtime,
)
from calque.shipping.saturation import saturates
from calque.shipping.verification import LEAST_DB, LIMIT_DB, OUTSIDE, TITLES, OutputAgreement, Verification

FUSED = (
    "OpenVINO fuses operators across roundings (a residual add or an activation into the layer in front of it), so that codes "
    "differ by a step: score the file by your own metric (calque.OnnxModel, --evaluate); a bound of 0 only measures."
)


@undisturbed
def verify(
    path: str | os.PathLike[str],
    model: QuantizedModel,
    inputs: object,
    *,
    target: Target = "onnxruntime",
    bound: float = BOUND,
    original: nn.Module | None = None,
) -> Verification:
    """How the exported file `path` agrees with `model` on `inputs` in a runtime, and how fast it is there.

    First the file's own plan and checksums are compared with the model's. Then every output is compared with the exact integer
    evaluation's: an output passes if a share of at least `bound` agrees (see `OutputAgreement`) and its error is 30 dB below it.
    Use at least 300 real inputs of a trained network: with random weights every input has the same class, and agreement
    means nothing.

    Args:
        inputs: as the calibration inputs of `calque.quantize`.
        target: "onnxruntime", with its optimizer on and off, "openvino" or "qonnx" (extras of these names).
        bound: the least share of each output that agrees with the exact integer evaluation, the optimizer on; 0 for figures
            without a verdict: nothing is asked of share and error, and another network's file is a note.
        original: the float network; the latency of both files is then measured, in turns, on the first input, in sessions as a
            user opens them (not in QONNX's executor, which is no deployment).

    Raises:
        MissingExtraError: the runtime is not installed.
        VerificationError: the file is another network's or run's by its metadata; the runtime is older than what the file has
            (both are named), or cannot load or run it; the inputs have another shape or type than the file's; the file has other
            outputs than the model; an output does not pass (`verification` of the error has all figures).
        SpecError: an unknown target, or a bound that is no share; no path; no quantized network, or one quantized in parts, which
            are verified one by one.
        CaptureError: an `original` that is no float network, or does not take the inputs.
        CalibrationError: inputs that are empty, not finite or of the wrong form.
        OSError: no such file.
    """
    path = file_to_read(path, "verify(path, q, inputs)")
    require_quantized(model, "verify(path, q, inputs)")
    if original is not None:
        require_original(original)
    if isinstance(model, PartlyQuantized):
        raise whole_only(model, "verify", "verify(file, q.parts[path], inputs)")
    if type(bound) not in (int, float) or not 0 <= bound <= 1:
        raise SpecError(f"bound is a share, from 0 to 1. Got {shown(bound)}.")
    check_target(target)
    proto = load_proto(path)
    origin = _origin(proto, model, bound)
    batches = prepare(inputs, model.signature, next(iter(model.buffers())).device, on_note=origin.append)
    for batch in batches:
        feeds_of(proto.graph.input, [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)])
    if original is not None:
        _require_same_call(original, batches[0])
    runtimes, edges = _opened(proto, model, target)
    kernels = (OnnxRuntime(proto) if edges else runtimes[0]).kernels()
    needed = settings_for_exact(proto, kernels, model, target)
    names = [output.name for output in proto.graph.output]
    optimized, *others = agreements(runtimes, model, batches, names, edges)
    (outside,) = agreements(runtimes[:1], model, [_scaled(batch) for batch in batches], names, edges)
    found = Verification(
        target, sum(rows(batch) for batch in batches), optimized, others[0] if others else None, outside,
        _counted(kernels, "integer"), _counted(kernels, "float"), _counted(kernels, "neutral"),
        {} if target == "qonnx" else _reasons(kernels, model), path.stat().st_size, model.report.size,
        (*origin, *_notes(needed, model, target)),
    )  # fmt: skip
    failed = [output for output in optimized.outputs if not output.passes(bound)]
    if failed:
        raise _refusal(found, failed, bound)
    if original is not None and target != "qonnx":
        leaves = [leaf for leaf in flatten(select(batches[0], torch.arange(1)))[0] if isinstance(leaf, Tensor)]
        latency = measure_latency(proto, float_onnx(original, model), leaves, target, exact=needed)
        found = replace(found, latency=latency)
    return found


def _origin(proto: onnx.ModelProto, model: QuantizedModel, bound: float) -> list[str]:
    """Notes on what the file says about its network. Raises: VerificationError, where that is another one and a bound is set."""
    unlike = differences(proto, model)
    if unlike and bound:
        raise VerificationError(
            f"{unlike} Export this network, or verify the file with the network that it was made from."
        )
    return [note for note in (unlike, unknown_origin(proto)) if note]


def _opened(proto: onnx.ModelProto, model: QuantizedModel, target: Target) -> tuple[list[Runtime], list[str]]:
    """The file as its runtime loads it, in ONNX Runtime also without the optimizer; and the edges whose codes it returns, too."""
    if target != "onnxruntime":
        return [open_runtime(proto, target)], []  # more outputs would change what OpenVINO fuses
    known = {output for node in proto.graph.node for output in node.output}
    edges = [name for name in model.quantizers if f"{name}/codes" in known]
    probed = _with_outputs(proto, edges)
    return [OnnxRuntime(probed), OnnxRuntime(probed, optimize=False)], edges


def _refusal(found: Verification, failed: list[OutputAgreement], bound: float) -> VerificationError:
    """Names the worst output, and what may be the reason: other codes, or saturation, which ONNX Runtime is kept from here."""
    output = min(failed, key=lambda each: (each.exact, LIMIT_DB if each.decibels is None else each.decibels))
    what = {"class scores": f"{found.inputs} rows", "values": "its values", "whole numbers": "its whole numbers"}[
        output.kind
    ]
    problems = []
    if output.exact < bound:
        problems.append(f"{output.exact:.2%} of {what} agree, less than the bound of {bound:.2%} (bound=, --bound)")
    if output.decibels is not None and output.decibels < LEAST_DB:
        problems.append(f"its error is {output.decibels:.1f} dB below it, and {LEAST_DB:g} dB is the least")
    reason = "".join(f" {note}" for note in (FUSED, *found.notes)) if found.target == "openvino" else ""
    if found.optimized.parted:
        share = f"{found.optimized.parted_share:.1%} of the codes of {found.optimized.parted} differ"
        reason = f" {share}, the first tensor that does. Is the file of this network?"
    elif found.target == "onnxruntime":
        reason = (
            " No tensor in front of it has other codes: what differs lies behind the last one. Was the file edited?"
        )
    where = f"output {output.name} in {TITLES[found.target]}"
    error = VerificationError(f"{where} is not that of the exact integer evaluation: {'; '.join(problems)}.{reason}")
    error.verification = found
    return error


def run_onnx(path: str | os.PathLike[str], inputs: list[Tensor], *, batch: int = 50) -> Tensor:
    """The first output of an ONNX file in ONNX Runtime (optimizer on) for flat inputs (N, ...).

    Raises:
        VerificationError: ONNX Runtime cannot load or run the file; inputs of another shape or type than the file's.
        OSError: no such file.
    """
    runtime = OnnxRuntime(load_proto(file_to_read(path, "run_onnx(path, inputs)")))
    pieces = zip(*(torch.split(tensor, batch) for tensor in inputs), strict=True)
    return torch.cat([runtime.run(list(piece))[0] for piece in pieces])


def _require_same_call(original: nn.Module, batch: Batch) -> None:
    """Raises CaptureError where the float network does not take the inputs, before anything slow is done with it."""
    try:
        require_call(original, select(batch, torch.arange(1)))
    except CalibrationError as error:
        raise CaptureError(f"original is not the network that q was made from: {error}") from error


def load_proto(path: Path) -> onnx.ModelProto:
    """Raises: VerificationError, where the file is not ONNX."""
    try:
        proto = onnx.load(path)
    except Exception as error:
        raise VerificationError(f"{path} is not an ONNX file: {error}") from error
    if not proto.graph.node:
        raise VerificationError(f"{path} is not an ONNX file of a network: its graph is empty. Export it again.")
    return proto


def _with_outputs(proto: onnx.ModelProto, edges: list[str]) -> onnx.ModelProto:
    """A copy whose graph also returns the codes of these edges; ONNX Runtime's fusions are not disturbed by that."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name in edges:
        copy.graph.output.append(helper.make_tensor_value_info(f"{name}/codes", TensorProto.UINT8, None))
    return copy


def count_kernels(
    path: str | os.PathLike[str], target: Target = "onnxruntime"
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Operators of the executed graph by name: integer kernels, float kernels, and neutral ones.

    Neutral operators move, convert or clip codes and indices.
    """
    kernels = open_runtime(load_proto(file_to_read(path, "count_kernels(path)")), target).kernels()
    return _counted(kernels, "integer"), _counted(kernels, "float"), _counted(kernels, "neutral")


def _counted(kernels: list[Kernel], precision: str) -> dict[str, int]:
    return dict(Counter(kernel.operator for kernel in kernels if kernel.precision == precision))


def _reasons(kernels: list[Kernel], model: QuantizedModel) -> dict[str, str]:
    """Why float kernels are float ones, by operator; layers are named, up to three."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for kernel in kernels:
        if kernel.precision == "float":
            layer = _layer_of(kernel, model)
            by_reason.setdefault((kernel.operator, _reason(layer, model)), []).append(layer)
    reasons: dict[str, str] = {}
    for (operator, reason), layers in by_reason.items():
        named = [layer for layer in layers if layer]
        listed = f" ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})" if named else ""
        reasons[operator] = "; ".join(filter(None, (reasons.get(operator), reason + listed)))
    return reasons


def _layer_of(kernel: Kernel, model: QuantizedModel) -> str:
    """The quantized layer whose constants the kernel reads, "" for none."""
    owners = {read.rsplit("/", 1)[0] for read in kernel.reads} | {
        read.rsplit("/", 2)[0] for read in kernel.reads if read.count("/") > 1
    }
    return next((name for name in model.layers if name in owners), "")


def _reason(layer: str, model: QuantizedModel) -> str:
    if not layer:
        return "values on no grid, or no integer kernel"
    if model.layers[layer].bias_scale is None:
        return "weights alone are quantized"
    return "not fused by the runtime"


def settings_for_exact(
    proto: onnx.ModelProto, kernels: list[Kernel], model: QuantizedModel, target: Target
) -> dict[str, str]:
    """What a session of ONNX Runtime must be given on this processor to compute this file's products exactly.

    Args:
        kernels: that the file has there.
    """
    if target != "onnxruntime":
        return {}
    fused = sum(kernel.operator == PACKED for kernel in kernels) > sum(n.op_type == PACKED for n in proto.graph.node)
    keys = [*([PRECISE] if _wide(model) and saturates(target) else []), *([LEVEL] if fused else [])]
    return {key: EXACT[key] for key in keys}


def _wide(model: QuantizedModel) -> list[str]:
    """The layers whose uint8 x int8 products may saturate."""
    return [name for name, layer in model.layers.items() if layer.bits == 8 and layer.bias_scale is not None]


def _notes(needed: dict[str, str], model: QuantizedModel, target: Target) -> tuple[str, ...]:
    notes = []
    if LEVEL in needed:
        notes.append(
            f"{PACKED} computes in float32 here ({LEVEL} = {EXACT[LEVEL]}); the runtime's default rounds the inputs of those "
            "that it fuses itself to 8 bits."
        )
    wide = _wide(model)
    if wide and target != "qonnx" and saturates(target):
        remedy = '7-bit weights do not: bits or first_last of "w7a8"'
        if target == "onnxruntime":
            remedy = f'set {PRECISE} = 1 in its session, as was done here, or use 7-bit weights ("w7a8")'
        notes.append(
            f"on this processor {TITLES[target]} saturates sums of uint8 x int8 products; {len(wide)} layers have 8-bit "
            f"weights ({', '.join(wide[:3])}{', ...' if len(wide) > 3 else ''}): {remedy}."
        )
    return tuple(notes)


def _scaled(batch: Batch) -> Batch:
    def larger(leaf: object) -> object:
        return leaf * OUTSIDE if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return {name: torch.utils._pytree.tree_map(larger, value) for name, value in batch.items()}
