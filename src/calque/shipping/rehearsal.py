"""A file's first run, before it is handed over: on a few rows, on one, and on other sizes where these are free.

A translation may mean something else than the operator it translates, hold only for the sizes that were traced, or meet a kernel
of ONNX Runtime that does. Such errors are no rounding: the file is refused, and the operator named.
"""

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from calque.errors import ExportError, VerificationError
from calque.network import Batch
from calque.network.network import FlatInput
from calque.network.signature import cut, flatten, have_rows, laid_out, length
from calque.quantized.model import QuantizedModel
from calque.shipping.lowering import behind
from calque.shipping.runtimes import OnnxRuntime

LEAST = 1000.0  # power of an output over that of its error: at 30 dB or better nothing is looked into
APART = 0.01  # share of a tensor's codes more than one step off: rounding alone leaves first differences of one step
ROUNDED = 1e-4  # share of the codes in front of it that rounding may have moved


def origins(proto: onnx.ModelProto) -> dict[str, str]:
    """The network's node behind each node that torch.onnx wrote, by name: read from the line of code that it keeps."""
    found = {}
    for node in proto.graph.node:
        trace = next((each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.stack_trace"), "")
        line = re.search(r"^\s*(\w+) = [^\n]*\s*\Z", trace, re.MULTILINE)
        if line:
            found[node.name] = line[1]
    return found


def rehearse(proto: onnx.ModelProto, model: QuantizedModel, behind_nodes: Mapping[str, str]) -> None:
    """Compares the file in ONNX Runtime with the network on the example that it was made with.

    Args:
        behind_nodes: of the file, nodes of the network: what `origins` found.

    Raises:
        ExportError: it cannot be loaded or run, has outputs of other shapes, or values far from the network's.
    """
    cases = list(_cases(model))
    if not cases:
        return
    runtime = _attempt(lambda: OnnxRuntime(proto), model, behind_nodes, "")
    for leaves in cases:
        try:
            with torch.no_grad():
                expected = [
                    output for output in model.evaluate(*leaves) if isinstance(output, Tensor)
                ]  # sizes stay out
        except (RuntimeError, IndexError, ValueError):  # sizes that the network does not take
            continue
        sizes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        received = _attempt(lambda leaves=leaves: runtime.run(leaves), model, behind_nodes, f" on inputs {sizes}")
        if not all(map(_near, expected, received)):
            _refuse(proto, model, leaves, received, sizes)


def _attempt(call: Any, model: QuantizedModel, behind_nodes: Mapping[str, str], where: str) -> Any:
    try:
        return call()
    except VerificationError as error:
        name = re.search(r"Name: ?'([^']+)'", str(error))
        origin = behind_nodes.get(name[1]) if name else None
        found = next((node for node in model.graph_module.graph.nodes if node.name == origin), None)
        named = "" if found is None else f"the operator {found.target} ({behind(model.layers, found)}) fails{where}: "
        raise ExportError(
            f"the file was not kept: {named}{error}{'' if named else where}. Write that operator with others, or fix the sizes "
            "that it reads."
        ) from error


def _cases(model: QuantizedModel) -> Iterator[list[Tensor]]:
    """Flat inputs: the example, its first row, and twice the size along the axes that are free."""
    example = laid_out(model.facts.example, model.signature.layout)
    counts = (length(example), 1) if any(have_rows(example)) and _has_free_rows(model, example) else (length(example),)
    for count in counts:
        yield _leaves(cut(example, torch.arange(count)))
    forms = _forms(model, example)
    free = [[] if form is None else [axis for axis in form.dynamic if axis or not rows] for form, rows in forms]
    leaves = flatten(example)[0]
    if any(free) and all(
        leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, Tensor)
    ):  # CUDA dies of bad indices
        yield [_doubled(leaf, axes) for leaf, axes in zip(leaves, free, strict=True) if isinstance(leaf, Tensor)]


def _forms(model: QuantizedModel, example: Batch) -> Iterator[tuple[FlatInput | None, bool]]:
    return zip(model.facts.inputs, have_rows(example), strict=True)


def _has_free_rows(model: QuantizedModel, example: Batch) -> bool:
    return all(form is None or not batched or 0 in form.dynamic for form, batched in _forms(model, example))


def _leaves(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]


def _doubled(leaf: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        leaf = torch.cat([leaf, leaf], axis)
    return leaf


def _near(expected: object, received: Tensor) -> bool:
    """Whether the shapes agree, and the values as far as rounding allows; indices may change by it."""
    if not isinstance(expected, Tensor):
        return True
    expected = expected.cpu()
    if expected.shape != received.shape:
        return False
    if not expected.is_floating_point():
        return True
    known = torch.isfinite(expected)
    power = expected[known].double().square().sum()
    return bool((expected - received)[known].double().square().sum() * LEAST <= power)


def _refuse(
    proto: onnx.ModelProto, model: QuantizedModel, leaves: list[Tensor], received: list[Tensor], sizes: str
) -> None:
    """Raises ExportError, unless the file computes the exact integer evaluation, or parts from it by rounding."""
    exact, codes, *_ = model.integer().trace(*leaves)
    if all(map(_near, exact, received)):
        return
    reader = _first_apart(proto, model, leaves, codes)
    if reader is not None:
        raise ExportError(
            "the file was not kept: in ONNX Runtime it computes something else than the quantized network on inputs "
            f"{sizes}, first at {_operators(model, reader)}. Write that operator with others, or fix the sizes that it reads."
        )


def _first_apart(
    proto: onnx.ModelProto, model: QuantizedModel, leaves: list[Tensor], codes: dict[str, Tensor]
) -> fx.Node | None:
    """The first quantizer whose codes are others than the exact ones; the output, where none's are.

    None where differences grow from one step at few places, as they may in a network of few bits.
    """
    known = {output for node in proto.graph.node for output in node.output}
    names = [name for name in codes if f"{name}/codes" in known]
    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    for name in names:
        probed.graph.output.append(helper.make_tensor_value_info(f"{name}/codes", TensorProto.UINT8, None))
    outputs = OnnxRuntime(probed).run(leaves)
    found = dict(zip(names, outputs[len(outputs) - len(names) :], strict=True))
    moved = distant = 0.0
    for node in model.graph_module.graph.nodes:
        name = str(model.facts.edges.get(str(node.target))) if node.op == "call_module" else ""
        if name in found:
            if codes[name].numel() != found[name].numel():
                return node  # type: ignore[no-any-return]
            steps = (codes[name].cpu().flatten().int() - found[name].flatten().int()).abs()
            far = (steps > 1).float().mean().item()
            if far > APART and distant <= ROUNDED:
                return node  # type: ignore[no-any-return]
            moved, distant = max(moved, (steps > 0).float().mean().item()), max(distant, far)
    return node if moved <= ROUNDED else None


def _operators(model: QuantizedModel, reader: fx.Node) -> str:
    """What computes the value that a node reads; for a layer also the operator in front of it."""
    source = reader.all_input_nodes[0]
    node: fx.Node | None = source
    while node is not None and (node.op == "call_module" or node.target is operator.getitem):
        node = next(iter(node.all_input_nodes), None)
    if node is None or node.op != "call_function":
        return f"layer {source.target}"
    named = f"the operator {node.target} ({behind(model.layers, node)})"
    return f"layer {source.target} or {named} in front of it" if source.op == "call_module" else named
