"""What executes an exported file, behind one interface: ONNX Runtime, OpenVINO and QONNX's executor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from calque.errors import SpecError, VerificationError
from calque.run.extras import import_extra
from calque.run.fields import shown
from calque.run.files import temporary_folder
from calque.shipping.feeds import feeds_of
from calque.shipping.releases import UPGRADE, too_old

Target = Literal["onnxruntime", "openvino", "qonnx"]
Precision = Literal["integer", "float", "neutral"]

# x86 processors without VNNI saturate sums of uint8 x int8 products at 16 bits; this makes ONNX Runtime compute them exactly.
PRECISE = "session.x64quantprecision"
# Products with packed 4-bit weights: ONNX Runtime's default, 4, rounds their float inputs to 8 bits at run time; 1 is float32.
LEVEL = "session.qdq_matmulnbits_accuracy_level"
EXACT: Mapping[str, str] = {PRECISE: "1", LEVEL: "1"}
DEFAULT: Mapping[str, str] = {}  # a session as users open it
PACKED = "MatMulNBits"
BLOCKED = "_nchwc"  # behind the value's name in that of a convolution that ONNX Runtime computes in blocks of channels
# Operators that move, convert or clip codes and indices; everything else that is not an integer kernel computes on floats.
_NEUTRAL = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Slice", "Pad", "Flatten", "Squeeze", "Unsqueeze",
        "Identity", "Shape", "Gather", "Cast", "Constant", "Min", "Max", "MaxPool", "NhwcMaxPool", "Split", "Expand",
        "Concat", "ReorderInput", "ReorderOutput", "DepthToSpace", "SpaceToDepth",
    }
)  # fmt: skip
# What computes in OpenVINO's executed graph; a quantizer, a bound on codes and everything that moves them is neutral.
_OPENVINO_COMPUTES = frozenset(
    {
        "Convolution",
        "Deconvolution",
        "FullyConnected",
        "MatMul",
        "Eltwise",
        "Pooling",
        "Reduce",
        "Softmax",
        "MVN",
        "Math",
    }
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operator of the graph that a runtime executes.

    Attributes:
        reads: names of its inputs in the file, as far as the runtime keeps them.
    """

    operator: str
    precision: Precision
    reads: tuple[str, ...]


class Runtime(Protocol):
    """A loaded file."""

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """All outputs for flat inputs (N, ...). Raises: VerificationError."""

    def kernels(self) -> list[Kernel]:
        """What it executes."""


class OnnxRuntime:
    """A file in ONNX Runtime on the CPU.

    Args:
        settings: entries of the session's configuration; exact products by default, which a session of a user does not have.

    Raises:
        VerificationError: ONNX Runtime cannot load the file, or is older than the file's opset, IR version, types or operators.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        threads: int | None = None,
        *,
        optimize: bool = True,
        settings: Mapping[str, str] = EXACT,
    ):
        reason = too_old(proto, ort.__version__)
        if reason is not None:
            raise VerificationError(f"{reason}. Run it where a newer one is: {UPGRADE}.")
        self._proto, self._threads, self._optimize, self._settings = proto, threads, optimize, settings
        self._session = self._open()

    def _open(self, save: Path | None = None) -> ort.InferenceSession:
        """A session; `save`: where the graph that it executes is written."""
        options = ort.SessionOptions()
        for key, value in self._settings.items():
            options.add_session_config_entry(key, value)
        options.log_severity_level = 4
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if self._optimize else levels.ORT_DISABLE_ALL
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if save is not None:
            options.optimized_model_filepath = str(save)
        content, providers = self._proto.SerializeToString(), ["CPUExecutionProvider"]
        return _attempt(
            "ONNX Runtime cannot load the file", lambda: ort.InferenceSession(content, options, providers=providers)
        )

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        feeds = feeds_of(self._proto.graph.input, leaves)
        outputs = _attempt("ONNX Runtime cannot run the file", lambda: self._session.run(None, feeds))
        return [torch.from_numpy(np.asarray(output)) for output in outputs]

    def kernels(self) -> list[Kernel]:
        with temporary_folder() as folder:
            saved = folder / "optimized.onnx"
            self._open(saved)
            nodes = onnx.load(saved).graph.node
        makers = {output: node for node in self._proto.graph.node for output in node.output}
        return [Kernel(node.op_type, _precision(node.op_type), _reads(node, makers)) for node in nodes]


def _reads(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> tuple[str, ...]:
    """The inputs of an executed node; of a convolution in blocks of channels those that it has in the file.

    Such a convolution, which processors get whose blocks fit its channels, reads reordered copies under new names; its own name
    is that of the value it makes, behind an activation or a residual add that is fused into it.

    Args:
        makers: the file's nodes by their outputs.
    """
    if node.op_type == "Conv" and BLOCKED in node.name:
        front = [node.name.rpartition(BLOCKED)[0]]
        while front:
            maker = makers.get(front.pop(0))
            if maker is not None and maker.op_type == "Conv":
                return tuple(maker.input)
            front.extend(maker.input if maker is not None else ())
    return tuple(node.input)


def _precision(operator: str) -> Precision:
    if operator.startswith(("QLinear", "QGemm")) or "Integer" in operator:
        return "integer"
    return "neutral" if operator in _NEUTRAL else "float"


class OpenVino:
    """A file in OpenVINO on the CPU.

    Raises:
        MissingExtraError: the extra is not installed.
        VerificationError: OpenVINO cannot load the file.
    """

    def __init__(self, proto: onnx.ModelProto, threads: int | None = None):
        core = import_extra("openvino").Core()
        content, limits = proto.SerializeToString(), {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._inputs = list(proto.graph.input)
        self._compiled = _attempt(
            "OpenVINO cannot load the file", lambda: core.compile_model(core.read_model(content), "CPU", limits)
        )

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        feeds = feeds_of(self._inputs, leaves)
        outputs = _attempt("OpenVINO cannot run the file", lambda: self._compiled(list(feeds.values())))
        return [torch.from_numpy(np.array(output)) for output in outputs.values()]

    def kernels(self) -> list[Kernel]:
        return [_openvino_kernel(node) for node in self._compiled.get_runtime_model().get_ordered_ops()]


def _openvino_kernel(node: Any) -> Kernel:
    facts = node.get_rt_info()
    operator, implementation, origins = (
        str(facts[key].astype(str) if hasattr(facts[key], "astype") else facts[key])
        for key in ("layerType", "primitiveType", "originalLayersNames")
    )
    computes = operator in _OPENVINO_COMPUTES
    integer = implementation.endswith(("I8", "U8"))
    precision: Precision = ("integer" if integer else "float") if computes else "neutral"
    return Kernel(operator, precision, tuple(f"{name}/weight" for name in origins.split(",")))


class Qonnx:
    """A QONNX file in QONNX's own executor, which computes on real numbers, node by node.

    Raises:
        MissingExtraError: the extra is not installed.
    """

    def __init__(self, proto: onnx.ModelProto, threads: int | None = None):
        self._execute = import_extra("qonnx", "qonnx.core.onnx_exec").execute_onnx
        self._wrap = import_extra("qonnx", "qonnx.core.modelwrapper").ModelWrapper
        self._infer = import_extra("qonnx", "qonnx.transformation.infer_shapes").InferShapes
        self._proto = proto

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        feeds = feeds_of(self._proto.graph.input, leaves)
        outputs = _attempt("QONNX cannot run the file", lambda: self._execute(self._shaped(feeds), feeds))
        return [torch.from_numpy(np.asarray(outputs[value.name])) for value in self._proto.graph.output]

    def _shaped(self, feeds: dict[str, NDArray[Any]]) -> Any:
        """The network at these sizes: the executor wants every shape."""
        sized = onnx.ModelProto()
        sized.CopyFrom(self._proto)
        for value in sized.graph.input:
            for axis, length in zip(value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=True):
                axis.dim_value = length
        for value in sized.graph.output:
            value.type.tensor_type.ClearField("shape")
        return self._wrap(sized).transform(self._infer())

    def kernels(self) -> list[Kernel]:
        neutral = _NEUTRAL | {"Quant"}
        return [
            Kernel(node.op_type, "neutral" if node.op_type in neutral else "float", tuple(node.input))
            for node in self._proto.graph.node
        ]


def open_runtime(proto: onnx.ModelProto, target: Target, threads: int | None = None) -> Runtime:
    """The file in a runtime, products exact where the runtime offers that.

    Args:
        threads: as many as the runtime takes by default (QONNX's executor always does).

    Raises:
        SpecError: an unknown target.
        MissingExtraError: the runtime is not installed.
        VerificationError: it cannot load the file.
    """
    check_target(target)
    runtimes: dict[str, Callable[[onnx.ModelProto, int | None], Runtime]] = {
        "onnxruntime": OnnxRuntime,
        "openvino": OpenVino,
        "qonnx": Qonnx,
    }
    return runtimes[target](proto, threads)


def check_name(target: object) -> None:
    """Raises SpecError where there is no such target."""
    if not isinstance(target, str) or target not in get_args(Target):
        raise SpecError(f"target is one of {', '.join(get_args(Target))}. Got {shown(target)}.")


def check_target(target: str) -> None:
    """Raises: SpecError, where there is no such runtime; MissingExtraError, where its extra is not installed."""
    check_name(target)
    if target != "onnxruntime":
        import_extra(target)


def _attempt(failure: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise VerificationError(f"{failure}: {line}") from error
