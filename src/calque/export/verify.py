"""Runs an exported file in a runtime and compares it with the quantized network it was made from."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from calque.calibration import prepare
from calque.errors import SpecError, VerificationError
from calque.export.latency import measure_latency
from calque.export.onnx import Target, float_onnx
from calque.export.runtimes import (
    LEVEL,
    PACKED,
    PRECISE,
    Kernel,
    OnnxRuntime,
    Runtime,
    check_target,
    open_runtime,
    saturates,
)
from calque.export.verification import OUTSIDE, TITLES, Agreement, Verification
from calque.graph import Batch
from calque.graph.signature import flatten, rows
from calque.model import QuantizedModel

BOUND = 0.99  # least agreement with the exact integer evaluation


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

    Use at least 300 real inputs of a trained network: with random weights every input has the same class, and agreement
    means nothing.

    Args:
        inputs: as the calibration inputs of `calque.quantize`.
        target: "onnxruntime", with its optimizer on and off, "openvino" or "qonnx" (extras of these names).
        bound: the least share of outputs that agree with the exact integer evaluation, the optimizer on; 0 for none.
        original: the float network; the latency of both files is then measured, in turns, on the first input (not in QONNX's
            executor, which is no deployment).

    Raises:
        VerificationError: the runtime is not installed, cannot load or run the file, or the file has other inputs than the
            model; agreement below the bound (`verification` of the error has all figures).
        SpecError: an unknown target, or a bound that is no share.
        CalibrationError: inputs that are empty, not finite or of the wrong form.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if not 0 <= bound <= 1:
        raise SpecError(f"bound is a share, from 0 to 1. Got {bound!r}.")
    check_target(target)
    batches = prepare(inputs, model.signature, next(iter(model.buffers())).device)
    proto = load_proto(path)
    edges: list[str] = []  # more outputs would change what OpenVINO fuses
    if target == "onnxruntime":
        known = {output for node in proto.graph.node for output in node.output}
        edges = [name for name in model.quantizers if f"{name}/codes" in known]
        probed = _with_outputs(proto, edges)
        runtimes: list[Runtime] = [OnnxRuntime(probed), OnnxRuntime(probed, optimize=False)]
        kernels = OnnxRuntime(proto).kernels()
    else:
        runtimes = [open_runtime(proto, target)]
        kernels = runtimes[0].kernels()
    optimized, *others = _agreements(runtimes, model, batches, edges)
    (outside,) = _agreements(runtimes[:1], model, [_scaled(batch) for batch in batches], edges)
    found = Verification(
        target, sum(rows(batch) for batch in batches), optimized, others[0] if others else None, outside,
        _counted(kernels, "integer"), _counted(kernels, "float"), _counted(kernels, "neutral"),
        {} if target == "qonnx" else _reasons(kernels, model), path.stat().st_size, model.report.size,
        _notes(kernels, model, target),
    )  # fmt: skip
    if optimized.exact < bound:
        raise _below(found, bound)
    if original is not None and target != "qonnx":
        leaves = [leaf[:1] for leaf in flatten(batches[0])[0] if isinstance(leaf, Tensor)]
        found = replace(found, latency=measure_latency(proto, float_onnx(original, model), leaves, target))
    return found


def _below(found: Verification, bound: float) -> VerificationError:
    """What may be the reason: another network's codes, which ONNX Runtime shows, or saturation, which it is kept from here."""
    reason = "".join(f" {note}" for note in found.notes) if found.target == "openvino" else ""
    if found.optimized.parted:
        share = f"{found.optimized.parted_share:.0%} of the codes of {found.optimized.parted} differ"
        reason = f" {share}, the first tensor that does. Is the file of this network?"
    error = VerificationError(
        f"{found.optimized.exact:.2%} of {found.inputs} outputs in {TITLES[found.target]} agree with the exact integer "
        f"evaluation, less than the bound of {bound:.2%} (bound=, --bound).{reason}"
    )
    error.verification = found
    return error


def run_onnx(path: str | os.PathLike[str], inputs: list[Tensor], *, batch: int = 50) -> Tensor:
    """The first output of an ONNX file in ONNX Runtime (optimizer on) for flat inputs (N, ...).

    Raises:
        VerificationError: ONNX Runtime cannot load or run the file.
    """
    runtime = OnnxRuntime(load_proto(Path(path)))
    pieces = zip(*(torch.split(tensor, batch) for tensor in inputs), strict=True)
    return torch.cat([runtime.run(list(piece))[0] for piece in pieces])


def load_proto(path: Path) -> onnx.ModelProto:
    """Raises: VerificationError, where the file is not ONNX."""
    try:
        return onnx.load(path)
    except Exception as error:
        raise VerificationError(f"{path} is not an ONNX file: {error}") from error


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
    kernels = open_runtime(load_proto(Path(path)), target).kernels()
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
        return "reads values that are on no grid, or has no integer kernel"
    if model.layers[layer].bias_scale is None:
        return "weights alone are quantized"
    return "not fused by the runtime"


def _notes(kernels: list[Kernel], model: QuantizedModel, target: Target) -> tuple[str, ...]:
    notes = []
    if any(kernel.operator == PACKED for kernel in kernels):
        notes.append(
            f"{PACKED} computes in float32 here ({LEVEL[0]} = {LEVEL[1]}); the runtime's default rounds the inputs of those "
            "that it fuses itself to 8 bits."
        )
    wide = [name for name, layer in model.layers.items() if layer.bits == 8 and layer.bias_scale is not None]
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


def _agreements(
    runtimes: list[Runtime], model: QuantizedModel, batches: list[Batch], edges: list[str]
) -> list[Agreement]:
    """Of each runtime with the exact evaluation and the simulation, which run once for all of them."""
    integer = model.integer()
    counts = [_Count(edges) for _ in runtimes]
    for batch in batches:
        leaves = [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]
        exact, codes, step = integer.trace(*leaves)
        with torch.no_grad():
            simulated = model.evaluate(*leaves)[0]
        for runtime, count in zip(runtimes, counts, strict=True):
            count.add(runtime.run(leaves), exact[0].cpu(), simulated.cpu(), step.cpu(), codes)
    return [count.agreement() for count in counts]


class _Count:
    """What one runtime's outputs and codes have in common with the exact evaluation, batch by batch."""

    def __init__(self, edges: list[str]):
        self.edges = edges
        self.exact, self.simulated, self.units = 0.0, 0.0, 0
        self.distance, self.largest, self.rows = 0.0, 0.0, 0
        self.wrong, self.codes = dict.fromkeys(edges, 0), dict.fromkeys(edges, 0)

    def add(
        self, outputs: list[Tensor], exact: Tensor, simulated: Tensor, step: Tensor, codes: dict[str, Tensor]
    ) -> None:
        """Counts one batch; the codes of the edges are the last outputs."""
        received = outputs[0]
        steps = ((received - exact).abs() / step).double()
        if exact.dim() == 2:
            self.exact += (exact.argmax(1) == received.argmax(1)).sum().item()
            self.simulated += (simulated.argmax(1) == received.argmax(1)).sum().item()
            self.units += len(exact)
        else:
            self.exact += (steps < 0.5).sum().item()
            self.simulated += ((received - simulated).abs() / step < 0.5).sum().item()
            self.units += exact.numel()
        self.distance += steps.mean().item() * len(exact)
        self.largest = max(self.largest, steps.max().item())
        self.rows += len(exact)
        for name, found in zip(self.edges, outputs[len(outputs) - len(self.edges) :], strict=True):
            self.wrong[name] += int((codes[name].cpu() != found.reshape(codes[name].shape)).sum())
            self.codes[name] += found.numel()

    def agreement(self) -> Agreement:
        parted = next((name for name in self.edges if self.wrong[name]), "")
        share = self.wrong[parted] / self.codes[parted] if parted else 0.0
        exact, simulated = self.exact / self.units, self.simulated / self.units
        return Agreement(exact, simulated, self.distance / self.rows, self.largest, parted, share)
