"""Runs an exported file in ONNX Runtime and compares it with the quantized network it was made from."""

import json
import os
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import Tensor

from calque.calibration import prepare
from calque.errors import VerificationError
from calque.graph import Batch
from calque.graph.signature import flatten, rows
from calque.model import QuantizedModel
from calque.report import table_lines

OUTSIDE = 8.0  # inputs "far outside": this many times as large
# Nodes that move, convert or clip codes and indices; everything else that is not an integer kernel computes on floats.
_NEUTRAL = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Slice", "Pad", "Flatten", "Squeeze", "Unsqueeze",
        "Identity", "Shape", "Gather", "Cast", "Constant", "Min", "Max", "MaxPool", "NhwcMaxPool", "Split", "Expand",
        "Concat", "ReorderInput", "ReorderOutput", "DepthToSpace", "SpaceToDepth",
    }
)  # fmt: skip

# x86 processors without VNNI saturate sums of uint8 x int8 products at 16 bits; this makes ONNX Runtime compute them exactly.
PRECISE = "session.x64quantprecision"
# Products with packed 4-bit weights: ONNX Runtime's default, 4, rounds their float inputs to 8 bits at run time; 1 is float32.
LEVEL = ("session.qdq_matmulnbits_accuracy_level", "1")
PACKED = "MatMulNBits"


@dataclass(frozen=True, slots=True)
class Agreement:
    """One file, one optimizer setting, one set of inputs, against the exact integer evaluation and the simulation.

    Attributes:
        exact, simulated: share of rows whose first output has the same top-1 (for outputs (N, C)), or of output values that
            are less than half a step apart (for any other output).
        mean_steps, largest_steps: distance to the exact evaluation in steps of the output.
        parted: the first tensor whose codes differ from the exact evaluation's in any place ("" if none does).
        parted_share: of that tensor's codes.
    """

    exact: float
    simulated: float
    mean_steps: float
    largest_steps: float
    parted: str
    parted_share: float


@dataclass(frozen=True, slots=True)
class Verification:
    """What ONNX Runtime does with an exported file.

    Attributes:
        inputs: rows compared.
        optimized, plain: with the optimizer on and off, on the given inputs.
        outside: with the optimizer on, on inputs OUTSIDE times as large.
        integer_kernels, float_kernels, other_kernels: operator -> count in the optimized graph.
        file_bytes: of the file.
    """

    inputs: int
    optimized: Agreement
    plain: Agreement
    outside: Agreement
    integer_kernels: dict[str, int]
    float_kernels: dict[str, int]
    other_kernels: dict[str, int]
    file_bytes: int

    @property
    def agreement_exact(self) -> float:
        return self.optimized.exact

    @property
    def agreement(self) -> float:
        return self.optimized.simulated

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        headings = (
            "ONNX Runtime",
            "= exact",
            "= simulated",
            "mean steps",
            "largest",
            "first tensor that parts",
        )
        cases = (("optimized", self.optimized), ("optimizer off", self.plain), ("far outside", self.outside))
        lines = table_lines(headings, [(name, *_cells(case)) for name, case in cases])
        for title, kernels in (("integer", self.integer_kernels), ("float", self.float_kernels)):
            names = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
            lines.append(f"{title} kernels: {names or 'none'}")
        if PACKED in self.float_kernels:
            lines.append(
                f"{PACKED} computes in float32 here ({LEVEL[0]} = {LEVEL[1]}); the runtime's default rounds its inputs to 8 bits"
            )
        lines.append(f"{self.inputs} inputs, {self.file_bytes:,} bytes")
        return "\n".join(lines)


def _cells(case: Agreement) -> tuple[str, ...]:
    parted = f"{case.parted} ({case.parted_share:.1e} of its codes)" if case.parted else "none"
    return (
        f"{case.exact:.2%}",
        f"{case.simulated:.2%}",
        f"{case.mean_steps:.2g}",
        f"{case.largest_steps:.2g}",
        parted,
    )


def verify(path: str | os.PathLike[str], model: QuantizedModel, inputs: object) -> Verification:
    """How the exported file `path` agrees with `model` on `inputs`, with ONNX Runtime's optimizer on and off.

    Use at least 300 real inputs of a trained network: with random weights every input has the same class, and agreement
    means nothing.

    Args:
        inputs: as the calibration inputs of `calque.quantize`.

    Raises:
        VerificationError: ONNX Runtime cannot load or run the file, or the file has other inputs than the model.
        CalibrationError: inputs that are empty, not finite or of the wrong form.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    device = next(iter(model.buffers())).device
    batches = prepare(inputs, model.signature, device)
    proto = _load(path)
    edges = [name for name in model.quantizers if f"{name}/codes" in {o for n in proto.graph.node for o in n.output}]
    probed = _with_outputs(proto, edges)
    optimized, plain = _session(probed, optimize=True), _session(probed, optimize=False)
    larger = [_scaled(batch) for batch in batches]
    integer, floats, others = count_kernels(path)
    return Verification(
        sum(rows(batch) for batch in batches),
        _agreement(optimized, model, batches, edges),
        _agreement(plain, model, batches, edges),
        _agreement(optimized, model, larger, edges),
        integer,
        floats,
        others,
        path.stat().st_size,
    )


def run_onnx(path: str | os.PathLike[str], inputs: list[Tensor], *, batch: int = 50) -> Tensor:
    """The first output of an ONNX file in ONNX Runtime (optimizer on) for flat inputs (N, ...).

    Raises:
        VerificationError: ONNX Runtime cannot load or run the file.
    """
    session = _session(_load(Path(path)), optimize=True)
    pieces = zip(*(torch.split(tensor, batch) for tensor in inputs), strict=True)
    return torch.cat([_run(session, list(piece))[0] for piece in pieces])


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:
        raise VerificationError(f"{path} is not an ONNX file: {error}") from error


def _with_outputs(proto: onnx.ModelProto, edges: list[str]) -> onnx.ModelProto:
    """A copy whose graph also returns the codes of these edges; fusions are not disturbed by that."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name in edges:
        copy.graph.output.append(helper.make_tensor_value_info(f"{name}/codes", TensorProto.UINT8, None))
    return copy


def _session(proto: onnx.ModelProto, *, optimize: bool, save: str | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry(PRECISE, "1")
    options.add_session_config_entry(*LEVEL)
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = save
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(f"ONNX Runtime cannot load the file: {_first_line(error)}") from error


def _run(session: ort.InferenceSession, leaves: list[Tensor]) -> list[Tensor]:
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(leaves):
        raise VerificationError(f"the file has {len(names)} inputs ({', '.join(names)}). Got {len(leaves)}.")
    feeds = {name: np.ascontiguousarray(leaf.cpu().numpy()) for name, leaf in zip(names, leaves, strict=True)}
    try:
        return [torch.from_numpy(np.asarray(output)) for output in session.run(None, feeds)]
    except Exception as error:
        raise VerificationError(f"ONNX Runtime cannot run the file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def count_kernels(path: str | os.PathLike[str]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Operators of ONNX Runtime's optimized graph by name: integer kernels, float kernels, and neutral ones.

    Neutral operators move, convert or clip codes and indices.
    """
    with tempfile.TemporaryDirectory(prefix="calque-") as folder:
        saved = str(Path(folder) / "optimized.onnx")
        _session(_load(Path(path)), optimize=True, save=saved)
        counts = Counter(node.op_type for node in onnx.load(saved).graph.node)
    integer = {
        name: count for name, count in counts.items() if name.startswith(("QLinear", "QGemm")) or "Integer" in name
    }
    other = {name: count for name, count in counts.items() if name in _NEUTRAL}
    floats = {name: count for name, count in counts.items() if name not in integer and name not in other}
    return integer, floats, other


def _scaled(batch: Batch) -> Batch:
    def larger(leaf: object) -> object:
        return leaf * OUTSIDE if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return {name: torch.utils._pytree.tree_map(larger, value) for name, value in batch.items()}


def _agreement(
    session: ort.InferenceSession, model: QuantizedModel, batches: list[Batch], edges: list[str]
) -> Agreement:
    integer = model.integer()
    exact, simulated, distance, largest, units = 0.0, 0.0, 0.0, 0.0, 0
    wrong, total = dict.fromkeys(edges, 0), dict.fromkeys(edges, 0)
    for batch in batches:
        leaves = [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]
        outputs = _run(session, leaves)
        reference, codes, step = integer.trace(*leaves)
        with torch.no_grad():
            simulation = model.graph_module(*leaves)[0].cpu()
        mine, theirs = reference[0].cpu(), outputs[0]
        steps = ((theirs - mine).abs() / step.cpu()).double()
        if mine.dim() == 2:
            exact += (mine.argmax(1) == theirs.argmax(1)).sum().item()
            simulated += (simulation.argmax(1) == theirs.argmax(1)).sum().item()
            units += len(mine)
        else:
            exact += (steps < 0.5).sum().item()
            simulated += ((theirs - simulation).abs() / step.cpu() < 0.5).sum().item()
            units += mine.numel()
        distance += steps.mean().item() * len(mine)
        largest = max(largest, steps.max().item())
        for name, received in zip(edges, outputs[-len(edges) :] if edges else [], strict=True):
            wrong[name] += int((codes[name].cpu() != received.reshape(codes[name].shape)).sum())
            total[name] += received.numel()
    count = sum(rows(batch) for batch in batches)
    parted = next((name for name in edges if wrong[name]), "")
    share = wrong[parted] / total[parted] if parted else 0.0
    return Agreement(exact / units, simulated / units, distance / count, largest, parted, share)
