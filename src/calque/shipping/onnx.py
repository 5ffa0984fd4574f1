"""Writes a quantized network as an ONNX file that runtimes execute with integer kernels."""

import copy
import json
import logging
import operator
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from onnx import helper
from torch import fx, nn
from torch.utils import _pytree as pytree

from calque.errors import ExportError, SpecError
from calque.network.compat import CHECKS_FAIL, children, without_checks
from calque.network.exclusive import exclusively
from calque.network.network import FlatInput, is_symbolic, value_of
from calque.network.outputs import flatten_outputs
from calque.network.rewrites.functional import silent_tracing
from calque.network.spelling import respell, respellings
from calque.network.surroundings import undisturbed
from calque.quantized.admission import file_to_write, require_quantized
from calque.quantized.model import QuantizedModel
from calque.quantized.partly import PartlyQuantized, whole_only
from calque.run.files import FilePath, write_whole
from calque.shipping.axes import name_axes
from calque.shipping.compaction import drop_unread, fold_constants, share_constants, shorten
from calque.shipping.identity import COMPACT, PREFIX, identity
from calque.shipping.lowering import DOMAIN, TRANSLATIONS, behind, lower
from calque.shipping.names import interface, name_values
from calque.shipping.nodes import MICROSOFT, Expander, Shape
from calque.shipping.qonnx import QONNX_DOMAIN, QuantExpander
from calque.shipping.rehearsal import origins, rehearse
from calque.shipping.releases import too_old
from calque.shipping.runtimes import Target, check_name

log = logging.getLogger(__name__)

OPSET = 21  # the first with INT4


@undisturbed
def export_onnx(
    model: QuantizedModel,
    path: FilePath,
    *,
    target: Target = "onnxruntime",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Writes `model` to `path` as ONNX (opset 21) and returns the path; the batch axis and dynamic axes stay free.

    Args:
        target: "onnxruntime" and "openvino" read the same file, with packed weights and integer kernels; "qonnx" has one Quant
            node per tensor, and float32 weights.
        input_names: one for each input, in order. Default: forward's arguments, those inside a list or dict behind the
            argument's name (boxes_0, features_p3).
        output_names: one for each output that is a tensor, in order. Default: the keys and fields of what forward returns, joined
            by "_"; without any "output", or "output_0", "output_1", ... by position.

    A file for ONNX Runtime is run there before it is kept, on the few inputs that `model` has as an example. Where the installed
    release is too old for the file's types or operators, the file is kept untried, and a logged warning says so.

    The file holds the plan, checksums of the network, which `verify` compares, the recipe and versions in its metadata. It is
    written to a temporary name and moved, so that nothing half-written is ever left at `path`. The same network gives the same
    bytes.

    Raises:
        ExportError: an operator without a translation, which is named, or with one that is no valid ONNX; a file that ONNX
            Runtime cannot run, or in which it computes something else than the network.
        SpecError: an unknown target; no quantized network; names that are no distinct strings, one for each; a network quantized
            in parts, which are exported one by one.
        OSError: the path cannot be written, or is no regular file that another one can replace.
    """
    require_quantized(model, "export_onnx(q, path)")
    if isinstance(model, PartlyQuantized):
        raise whole_only(model, "export_onnx", "export_onnx(q.parts[path], file)")
    path = file_to_write(path, "export_onnx(q, path)")
    _require_shapes(model)
    check_name(target)
    names = interface(model, input_names, output_names)
    proto = _exported(_Flat(lower(model, fused=target != "qonnx")).eval(), model)
    behind_nodes = origins(proto)
    if target != "qonnx":
        fold_constants(proto)
    expander = (QuantExpander if target == "qonnx" else Expander)(model, _shapes(model))
    expander.expand(proto.graph)
    if target == "qonnx":
        proto.opset_import.append(helper.make_opsetid(QONNX_DOMAIN, 1))
    elif any(node.domain == MICROSOFT for node in proto.graph.node):
        proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    _clean(proto, model)
    name_values(proto.graph, names)
    name_axes(proto.graph, model)
    if target != "qonnx":
        shorten(proto.graph, _known_names(model).__contains__)
    _check(proto)
    if target == "onnxruntime":
        reason = too_old(proto, ort.__version__)
        if reason is None:
            rehearse(proto, model, behind_nodes)
        else:
            log.warning("%s: %s. It was not tried here; verify it where it will run.", path.name, reason)
    for node in proto.graph.node if target != "qonnx" else ():
        if node.name not in model.layers:  # what failed in the rehearsal was found by its name
            node.name = ""
    write_whole(path, proto.SerializeToString())
    return path


def _check(proto: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"torch.onnx wrote a file that is not valid ONNX: {str(error).splitlines()[0]}") from error


def _shapes(model: QuantizedModel) -> dict[str, Shape]:
    """The shape of each layer's output."""
    shapes: dict[str, Shape] = {}
    for node in model.graph_module.graph.nodes:
        value = value_of(node)
        if node.op == "call_module" and value is not None:
            shapes[str(node.target)] = tuple(str(size) if is_symbolic(size) else int(size) for size in value.shape)
    return shapes


def float_onnx(original: nn.Module, model: QuantizedModel) -> onnx.ModelProto:
    """The float network that `model` was made from, with the same inputs, outputs and free axes, under the same names.

    Raises:
        ExportError: an operator without a translation, which is named; another network.
    """
    proto = _exported(_Original(copy.deepcopy(original).eval(), children(model.in_spec)[1]).eval(), model)
    name_values(proto.graph, interface(model))
    name_axes(proto.graph, model)
    return proto


def _exported(module: nn.Module, model: QuantizedModel) -> onnx.ModelProto:
    """A module of flat inputs as torch.onnx translates it."""
    inputs: tuple[FlatInput | None, ...] = model.facts.inputs
    if any(form is None for form in inputs):
        raise ExportError("every input of an exported network must be a tensor. Leave out arguments that are not.")
    forms = [form for form in inputs if form is not None]
    device = next(iter(model.buffers())).device
    example = tuple(torch.zeros(form.shape, dtype=form.dtype, device=device) for form in forms)
    axes = tuple({axis: torch.export.Dim.AUTO for axis in form.dynamic} for form in forms)
    try:
        with exclusively(), silent_tracing(), torch.no_grad():
            program = torch.onnx.export(
                _spelled(module, example, axes),
                example,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(axes,),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"torch.onnx cannot translate {_culprit(model)}: {_root_cause(error)}") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def _spelled(
    module: nn.Module, example: tuple[torch.Tensor, ...], axes: tuple[dict[int, Any], ...]
) -> nn.Module | torch.export.ExportedProgram:
    """The module itself, or where code cannot spell one of its paths, a program that spells it otherwise."""
    spelled = respellings(module)
    if not spelled and not CHECKS_FAIL:
        return module
    program = torch.export.export(module, example, dynamic_shapes=(axes,), strict=False)
    respell(program, spelled)
    if CHECKS_FAIL:
        without_checks(program)
    return program


def _culprit(model: QuantizedModel) -> str:
    """The first operator that torch.onnx cannot translate by itself, and the layer in front of it."""
    tried = set()
    for node in model.graph_module.graph.nodes:
        if node.op != "call_function" or node.target in tried or node.target is operator.getitem:
            continue
        tried.add(node.target)
        read = [(source, value_of(source)) for source in node.all_input_nodes]
        sources = [source for source, value in read if value is not None]
        example = tuple(torch.zeros([int(n) for n in x.shape], dtype=x.dtype) for _, x in read if x is not None)
        try:
            with exclusively(), silent_tracing(), torch.no_grad():
                torch.onnx.export(_Single(node, sources), example, dynamo=True, opset_version=OPSET, verbose=False)
        except Exception:
            return f"the operator {node.target} ({behind(model.layers, node)})"
    return "the network"


class _Single(torch.nn.Module):
    """One operator of a graph, on the tensors that it reads."""

    def __init__(self, node: fx.Node, sources: list[fx.Node]):
        super().__init__()
        self.node, self.sources = node, sources

    def forward(self, *tensors: torch.Tensor) -> object:
        values = dict(zip(self.sources, tensors, strict=True))
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda source: values.get(source))
        assert callable(self.node.target)
        return self.node.target(*args, **kwargs)


class _Flat(torch.nn.Module):
    """Takes the flat inputs as *args, so that their names never clash with Python's."""

    def __init__(self, module: fx.GraphModule):
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.module(*inputs)


class _Original(torch.nn.Module):
    """A float network on flat inputs, with flat outputs."""

    def __init__(self, module: nn.Module, arguments: pytree.TreeSpec):
        super().__init__()
        self.module = module
        self.arguments = arguments

    def forward(self, *inputs: torch.Tensor) -> object:
        result, _ = flatten_outputs(self.module(**pytree.tree_unflatten(list(inputs), self.arguments)))
        return tuple(leaf for leaf in result if isinstance(leaf, torch.Tensor))


def _require_shapes(model: QuantizedModel) -> None:
    """Raises SpecError for a network that came out of pickle: torch keeps its code alone."""
    if not any("val" in node.meta for node in model.graph_module.graph.nodes):
        raise SpecError(
            "export_onnx(q, path) needs the shapes of q's values, which pickle and torch.save leave out. Export before, or keep "
            "q by calque.save and calque.load."
        )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _clean(proto: onnx.ModelProto, model: QuantizedModel) -> None:
    """Strips what nobody reads, names of values too, drops calque's domain and adds the metadata."""
    graph = proto.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    drop_unread(graph)
    scales = {f"{edge}/scale" for edge in model.quantizers}
    share_constants(graph, scales.__contains__)
    for tensor in (*graph.input, *graph.output, *graph.initializer):
        del tensor.metadata_props[:]
    domains = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(domains)
    del proto.metadata_props[:]
    facts = identity(model)
    if model.report is not None:
        keys = ("recipe", "placement", "seed", "calibration_rows")
        facts["run"] = json.dumps({key: getattr(model.report, key) for key in keys}, separators=COMPACT)
    versions = {"calque": version("calque"), "torch": torch.__version__, "onnx": onnx.__version__}
    facts["versions"] = json.dumps(versions, separators=COMPACT)
    for key, value in facts.items():
        proto.metadata_props.add(key=PREFIX + key, value=value)
    proto.producer_name, proto.producer_version = "calque", version("calque")
    graph.name = "calque"


def _known_names(model: QuantizedModel) -> set[str]:
    """Names that users and `verify` look for: codes, scales and biases of layers and edges, and parameters that stay float."""
    parts = ("codes", *(f"packed{rest}" for rest in range(8)), "scale", "bias", "bias/codes", "bias/scale")
    layers = {f"{layer}/{part}" for layer in model.layers for part in parts}
    edges = {f"{edge}/{part}" for edge in model.quantizers for part in ("codes", "scale")}
    floats = set(model.graph_module.state_dict())
    return layers | edges | floats
