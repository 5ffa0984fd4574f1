"""The same graph in fewer bytes: constants computed and shared, unread nodes dropped, short names for values nobody asks for."""

import itertools
import string
from collections.abc import Callable, Iterator

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from calque.shipping.names import rename

DIGITS = string.ascii_lowercase + string.digits
RANDOM = ("Random", "Multinomial", "Bernoulli")  # beginnings of operators that are other values in every run
UNKNOWN = (failures.Fail, failures.NotImplemented, failures.InvalidArgument, failures.InvalidGraph)


def fold_constants(proto: onnx.ModelProto) -> None:
    """Replaces values that are the same in every run by constants, in place, where these are no larger than their sources.

    ONNX Runtime computes them, as it would at load. A mask that is compared with 0 becomes one of booleans; a table that is
    expanded stays as it is. What ONNX Runtime cannot compute stays, too.
    """
    graph = proto.graph
    sizes = {tensor.name: len(tensor.raw_data) or tensor.ByteSize() for tensor in graph.initializer}
    made: dict[str, set[str]] = {name: {name} for name in sizes}  # constant value -> the initializers it is made from
    constant: list[onnx.NodeProto] = []
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if all(name in made for name in inputs) and len(node.output) == 1 and _is_pure(node):
            constant.append(node)
            sources = set().union(*(made[name] for name in inputs))
            if node.op_type == "Constant":
                sources, sizes[node.output[0]] = {node.output[0]}, node.ByteSize()
            made[node.output[0]] = sources
    inside = {node.output[0] for node in constant}
    outside = [node for node in graph.node if node.output[0] not in inside]
    read = {name for node in outside for name in node.input} | {value.name for value in graph.output}
    for tensor in _evaluated(proto, constant, sorted(inside & read)):
        if len(tensor.raw_data) <= sum(sizes[name] for name in made[tensor.name]):
            graph.initializer.append(tensor)
    known = {tensor.name for tensor in graph.initializer}
    kept = [node for node in graph.node if node.output[0] not in known]
    del graph.node[:]
    graph.node.extend(kept)


def _is_pure(node: onnx.NodeProto) -> bool:
    graphs = any(
        attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
    )
    return node.domain == "" and not graphs and not node.op_type.startswith(RANDOM)


def _evaluated(proto: onnx.ModelProto, nodes: list[onnx.NodeProto], names: list[str]) -> Iterator[TensorProto]:
    if not names:
        return
    outputs = [helper.make_empty_tensor_value_info(name) for name in names]
    read = {name for node in nodes for name in node.input}
    sources = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    graph = helper.make_graph(nodes, "constants", [], outputs, sources)
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(names, {})
    except UNKNOWN:
        return
    for name, value in zip(names, values, strict=True):
        yield numpy_helper.from_array(value, name)


def share_constants(graph: onnx.GraphProto, kept: Callable[[str], bool]) -> None:
    """Makes equal constants one, in place.

    ONNX Runtime converts int8 weights and their zero points to uint8 under one name, and fails where two layers read the same
    ones: these are left alone.

    Args:
        kept: names of constants that others read.
    """
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed = {}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.INT8 or kept(tensor.name) or not tensor.raw_data:
            continue
        name = first.setdefault((tensor.data_type, tuple(tensor.dims), tensor.raw_data), tensor.name)
        if name != tensor.name:
            renamed[tensor.name] = name
    for value in graph.output:
        renamed.pop(value.name, None)
    initializers = [tensor for tensor in graph.initializer if tensor.name not in renamed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    rename(graph, renamed)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Removes nodes whose outputs nobody reads, and constants, in place."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            nodes.append(node)
            read.update(node.input)
            read.update(_captured(node))
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(initializers)


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """What the branches and bodies of a node read from outside."""
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (value.name for value in graph.output)


def shorten(graph: onnx.GraphProto, kept: Callable[[str], bool]) -> None:
    """Gives every value and constant of the graph a name of a few letters, in place, but inputs, outputs and those kept."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    fixed.update(name for node in graph.node for name in _captured(node))
    named = [tensor.name for tensor in graph.initializer] + [
        name for node in graph.node for name in node.output if name
    ]
    fixed.update(filter(kept, named))
    free = (name for name in _short_names() if name not in fixed)
    rename(graph, {name: next(free) for name in named if name not in fixed})


def _short_names() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ..., a9, ba, ...: a letter first."""
    for length in itertools.count():
        for letters in itertools.product(string.ascii_lowercase, *[DIGITS] * length):
            yield "".join(letters)
