"""Writes a quantized network as an ONNX file that runtimes execute with integer kernels."""

import contextlib
import copy
import io
import json
import operator
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import onnx
import torch
from onnx import helper
from torch import fx, nn
from torch.utils import _pytree as pytree

from calque.errors import ExportError, SpecError
from calque.export.identity import PREFIX, identity
from calque.export.lowering import DOMAIN, TRANSLATIONS, behind, lower
from calque.export.nodes import MICROSOFT, Expander
from calque.export.qonnx import QONNX_DOMAIN, QuantExpander
from calque.export.rehearsal import origins, rehearse
from calque.export.runtimes import Target
from calque.graph.network import FlatInput, value_of
from calque.graph.outputs import flatten_outputs
from calque.graph.rewrite import silent_tracing
from calque.graph.signature import have_rows, laid_out
from calque.graph.spelling import respell, respellings
from calque.model import QuantizedModel
from calque.parts import PartlyQuantized, whole_only

OPSET = 21  # the first with INT4


def export_onnx(model: QuantizedModel, path: str | os.PathLike[str], *, target: Target = "onnxruntime") -> Path:
    """Writes `model` to `path` as ONNX (opset 21) and returns the path; the batch axis and dynamic axes stay free.

    Args:
        target: "onnxruntime" and "openvino" read the same file, with packed weights and integer kernels; "qonnx" has one Quant
            node per tensor, and float32 weights.

    A file for ONNX Runtime is run there before it is kept, on the few inputs that `model` has as an example.

    The file holds the plan, checksums of the network, which `verify` compares, the recipe and versions in its metadata. It is
    written to a temporary name and moved, so that nothing half-written is ever left at `path`.

    Raises:
        ExportError: an operator without a translation, which is named, or with one that is no valid ONNX; a file that ONNX
            Runtime cannot run, or in which it computes something else than the network.
        SpecError: an unknown target; a network quantized in parts, which are exported one by one.
        OSError: the path cannot be written.
    """
    path = Path(path)
    if isinstance(model, PartlyQuantized):
        raise whole_only(model, "export_onnx", "export_onnx(q.parts[path], file)")
    if target not in get_args(Target):
        raise SpecError(f"target is one of {', '.join(get_args(Target))}. Got {target!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist.")
    proto = _exported(_Flat(lower(model, fused=target != "qonnx")).eval(), model)
    behind_nodes = origins(proto)
    expander = (QuantExpander if target == "qonnx" else Expander)(model, _ranks(model))
    expander.expand(proto.graph)
    if target == "qonnx":
        proto.opset_import.append(helper.make_opsetid(QONNX_DOMAIN, 1))
    elif any(node.domain == MICROSOFT for node in proto.graph.node):
        proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    _clean(proto, model)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"torch.onnx wrote a file that is not valid ONNX: {str(error).splitlines()[0]}") from error
    if target == "onnxruntime":
        rehearse(proto, model, behind_nodes)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(proto.SerializeToString())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _ranks(model: QuantizedModel) -> dict[str, int]:
    """The rank of each layer's output."""
    ranks = {}
    for node in model.graph_module.graph.nodes:
        value = value_of(node)
        if node.op == "call_module" and value is not None:
            ranks[str(node.target)] = value.dim()
    return ranks


def float_onnx(original: nn.Module, model: QuantizedModel) -> onnx.ModelProto:
    """The float network that `model` was made from, with the same inputs and free axes.

    Raises:
        ExportError: an operator without a translation, which is named.
    """
    return _exported(_Original(copy.deepcopy(original).eval(), model.in_spec.child(1)).eval(), model)


def _exported(module: nn.Module, model: QuantizedModel) -> onnx.ModelProto:
    """A module of flat inputs as torch.onnx translates it."""
    inputs: tuple[FlatInput | None, ...] = model.facts["inputs"]
    if any(form is None for form in inputs):
        raise ExportError("every input of an exported network must be a tensor. Leave out arguments that are not.")
    forms = [form for form in inputs if form is not None]
    device = next(iter(model.buffers())).device
    example = tuple(torch.zeros(form.shape, dtype=form.dtype, device=device) for form in forms)
    axes = tuple({axis: torch.export.Dim.AUTO for axis in form.dynamic} for form in forms)
    try:
        with silent_tracing(), _silent_output(), torch.no_grad():
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
    _name_inputs(proto.graph, [form.name for form in forms])
    return proto


def _spelled(
    module: nn.Module, example: tuple[torch.Tensor, ...], axes: tuple[dict[int, Any], ...]
) -> nn.Module | torch.export.ExportedProgram:
    """The module itself, or where code cannot spell one of its paths, a program that spells it otherwise."""
    spelled = respellings(module)
    if not spelled:
        return module
    program = torch.export.export(module, example, dynamic_shapes=(axes,), strict=False)
    respell(program, spelled)
    return program


def _name_inputs(graph: onnx.GraphProto, names: list[str]) -> None:
    """Gives the inputs the names of forward's arguments, in place; what torch.onnx called like one of them is renamed."""
    own = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    known = own | {value.name for value in graph.input} | set(names)
    renamed = {value.name: name for value, name in zip(graph.input, names, strict=True)}
    for name in sorted(own & set(names)):
        free = f"{name}_"
        while free in known:
            free += "_"
        renamed[name] = free
        known.add(free)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [renamed.get(name, name) for name in values]
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = renamed.get(value.name, value.name)


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
            with silent_tracing(), _silent_output(), torch.no_grad():
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


@contextlib.contextmanager
def _silent_output() -> Iterator[None]:
    """torch.onnx prints its progress; the terminal is the command line's."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _clean(proto: onnx.ModelProto, model: QuantizedModel) -> None:
    """Strips what the exporter writes beside names, drops calque's domain and unused constants, adds the metadata."""
    graph = proto.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for tensor in (*graph.input, *graph.output, *graph.initializer):
        del tensor.metadata_props[:]
    domains = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(domains)
    _name_batch_axis(graph, model)
    del proto.metadata_props[:]
    facts = identity(model)
    if model.report is not None:
        keys = ("recipe", "placement", "seed", "calibration_rows")
        facts["run"] = json.dumps({key: getattr(model.report, key) for key in keys})
    facts["versions"] = json.dumps({"calque": version("calque"), "torch": torch.__version__, "onnx": onnx.__version__})
    for key, value in facts.items():
        proto.metadata_props.add(key=PREFIX + key, value=value)
    proto.producer_name, proto.producer_version = "calque", version("calque")
    graph.name = "calque"


def _name_batch_axis(graph: onnx.GraphProto, model: QuantizedModel) -> None:
    batched = have_rows(laid_out(model.facts["example"], model.signature.layout))
    axes = [
        value.type.tensor_type.shape.dim[0].dim_param for value, rows in zip(graph.input, batched, strict=False) if rows
    ]
    symbol = axes[0] if axes else ""
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if symbol and dim.dim_param == symbol:
                dim.dim_param = "batch"
