"""Which release of ONNX Runtime a file asks for, read from its opsets, its IR version, its types and operators.

All of it was measured with `python -m benchmarks.runtime_versions` (benchmarks/results/runtime_versions.md).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

Release = tuple[int, int]

# The highest opset of ai.onnx and the highest IR version that each release reads.
READS: dict[Release, tuple[int, int]] = {
    (1, 17): (20, 9),
    (1, 18): (21, 10),
    (1, 21): (22, 10),
    (1, 23): (23, 11),
    (1, 24): (25, 13),
    (1, 25): (26, 13),
    (1, 32): (27, 14),
}
NEWEST: Release = (1, 32)  # that was measured
PACKED_4, BLOCKS_4 = (
    (1, 19),
    (1, 19),
)  # the first to decode INT4, and to multiply with blocks of 4 bits as calque writes them
CAST_4, BLOCKS_8 = (1, 23), (1, 23)  # the first to cast INT4, and to multiply with blocks of 8 bits
LEAST_OF_BYTES = (1, 24)  # the first with a Min of 8-bit integers
UPGRADE = "pip install --upgrade onnxruntime"


@dataclass(frozen=True, slots=True, order=True)
class Need:
    """The first release that reads something in a file."""

    release: Release
    reason: str

    def __str__(self) -> str:
        return f"ONNX Runtime {spelled(self.release)} or newer ({self.reason})"


def spelled(release: Release) -> str:
    return ".".join(map(str, release))


def need(proto: onnx.ModelProto) -> Need:
    """The first release of ONNX Runtime that runs the file on the CPU, and what asks for it.

    An opset or IR version that no measured release reads asks for one behind the newest of these.
    """
    return max(_needs(proto), key=lambda each: each.release)


def too_old(proto: onnx.ModelProto, installed: str) -> str | None:
    """Why the installed release cannot run the file, in one sentence; None where it can, or is no known release.

    Args:
        installed: `onnxruntime.__version__`.
    """
    numbers, asked = re.match(r"(\d+)\.(\d+)", installed), need(proto)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= asked.release:
        return None
    return f"the file needs {asked}, and {installed} is installed"


def _needs(proto: onnx.ModelProto) -> Iterator[Need]:
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    behind = (NEWEST[0], NEWEST[1] + 1)
    yield Need(next((release for release, (most, _) in READS.items() if opset <= most), behind), f"opset {opset}")
    version = proto.ir_version
    yield Need(
        next((release for release, (_, most) in READS.items() if version <= most), behind), f"IR version {version}"
    )
    for graph in _graphs(proto.graph):
        kinds = {value.name: value.data_type for value in graph.initializer}
        for node in graph.node:
            yield from _needs_of(node, {kinds[name] for name in node.input if name in kinds})


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its operators (branches, loops)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _needs_of(node: onnx.NodeProto, kinds: set[int]) -> Iterator[Need]:
    """What one operator asks for.

    Args:
        kinds: the types of the constants that it reads.
    """
    if kinds & {TensorProto.INT4, TensorProto.UINT4}:
        cast = node.op_type == "Cast"
        yield Need(CAST_4 if cast else PACKED_4, "Cast of 4-bit integers" if cast else "4-bit integers")
    if node.op_type in ("Min", "Max") and kinds & {TensorProto.INT8, TensorProto.UINT8}:
        yield Need(LEAST_OF_BYTES, f"{node.op_type} of 8-bit integers, which activations below 8 bits have")
    if node.op_type == "MatMulNBits":
        bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)
        yield Need(BLOCKS_4 if bits == 4 else BLOCKS_8, f"MatMulNBits of {bits} bits")
