"""Quantized networks to files and back. Reading one runs no code from it.

A file has what the float network's architecture lacks: codes at their bits, scales, biases, every tensor that
stays float, and as JSON the plan, the report, the operators and the form of the inputs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from calque.errors import CalqueError, LoadError, SpecError
from calque.grid.arithmetic import pack, unpack
from calque.grid.bits import Bits, Plan
from calque.network import Batch, Network, Signature, capture
from calque.network.copies import duplicate
from calque.network.rewrites.factors import insert_factor
from calque.network.signature import Axis, Layout, laid_out
from calque.network.surroundings import undisturbed
from calque.quantized.admission import file_to_read, file_to_write, require_original, require_quantized
from calque.quantized.assembled import Assembled, assemble
from calque.quantized.model import Facts, QuantizedModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.quantized.partly import PartlyQuantized, whole_only
from calque.quantized.placement import place
from calque.quantized.prices import Prices
from calque.report import Report
from calque.run.files import FilePath
from calque.shipping.saved.architecture import (
    describe_input,
    differences,
    example_input,
    grids,
    left_float,
    mismatches,
    operators,
    shapes,
)
from calque.shipping.saved.contents import (
    check_floats,
    check_grids,
    check_plan,
    check_ranges,
    check_scales,
    check_tensors,
)
from calque.shipping.saved.file import FORMAT, Tensors, deduplicate, read, write
from calque.shipping.saved.rules import check_table

EXAMPLE_SEED = 0  # of the inputs with which an architecture is captured again; their values do not matter


@undisturbed
def save(q: QuantizedModel, path: FilePath) -> None:
    """Writes `q` to the safetensors file `path`, whole or not at all.

    Raises:
        SpecError: no quantized network, or one quantized in parts; forward takes something else than tensors, numbers,
            strings, None, lists, tuples, dicts.
        OSError: `path` cannot be written.
    """
    require_quantized(q, "save(q, path)")
    if isinstance(q, PartlyQuantized):
        raise whole_only(q, "save", "save(q.parts[path], file)")
    path = file_to_write(path, "save(q, path)")
    tensors, layout = _tensors(q), q.signature.layout
    example: Tensors = {}
    form = {name: describe_input(value, example) for name, value in q.facts.example.items()}
    aliases = deduplicate(tensors)
    tensors.update({key: value for key, value in example.items() if not value.is_floating_point()})
    table = {
        "format": FORMAT,
        "versions": {"calque": version("calque"), "torch": torch.__version__},
        "plan": {name: str(bits) for name, bits in q.plan.items()},
        "report": None if q.report is None else json.loads(q.report.to_json()),
        "placement": q.facts.placement,
        "dynamic": {name: sorted(axes) for name, axes in q.facts.dynamic.items() if isinstance(axes, Mapping)},
        "equal_axes": q.facts.equal_axes,
        "inputs": form,
        "layout": None if layout is None else {**asdict(layout), "whole": sorted(layout.whole)},
        "layers": {name: {"bits": part.bits, "shape": list(part.codes.shape)} for name, part in q.layers.items()},
        "operators": operators(q.graph_module),
        "grids": grids(q.graph_module, q.facts.edges),
        "scaled": q.facts.scaled,
        "aliases": aliases,
    }
    check_table(json.loads(json.dumps(table)))
    check_tensors(table, tensors)
    write(path, table, tensors)


@undisturbed
def load(path: FilePath, model: nn.Module) -> QuantizedModel:
    """The quantized network that `save` wrote, on the device of `model`.

    Args:
        model: the float network's architecture; its weights are not read.

    No field of the file is believed: each is checked against its range and its neighbours before anything is built.

    Raises:
        LoadError: a file that is not calque's, is damaged, or breaks a rule of the format, with the field and the rule; an
            architecture that does not fit it, every mismatch named.
        SpecError, CaptureError: no path, or no float network.
        OSError: `path` cannot be read.
    """
    path = file_to_read(path, "load(path, model)")
    require_original(model)
    return restored(path, model)


def restored(path: FilePath, model: nn.Module, prices: Prices | None = None) -> QuantizedModel:
    """What `load` returns, with the prices that were measured beside it."""
    table, tensors = read(path)
    with _naming(path):
        check_table(table)
        check_tensors(table, tensors)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    tensors = {key: value.to(device) for key, value in tensors.items()}
    tensors.update({alias: tensors[key] for alias, key in table["aliases"].items()})
    generator = torch.Generator().manual_seed(EXAMPLE_SEED)
    example = {name: example_input(form, tensors, generator, device) for name, form in table["inputs"].items()}
    network = _capture(path, model, example, table)
    for index, names in enumerate(table.get("scaled", ())):
        insert_factor(network, tuple(names), index)
    problems = mismatches(network, table, tensors) or differences(table["operators"], operators(network.module))
    if problems:
        raise _misfit(path, problems)
    with _naming(path):
        check_floats(network, model, tensors)
    plan = Plan({name: Bits.parse(bits) for name, bits in table["plan"].items()})
    assembled = _assembled(path, network, plan, table, tensors)
    facts = Facts.of(
        assembled,
        placement=table["placement"],
        example=example,
        dynamic=_dynamic(table),
        equal_axes=_equal_axes(table),
    )
    report = None if table["report"] is None else Report.from_json(json.dumps(table["report"]))
    return QuantizedModel(assembled, facts, report, prices)


@contextmanager
def _naming(path: FilePath) -> Iterator[None]:
    """Turns an error that names a field into one that names the file, too."""
    try:
        yield
    except SpecError as error:
        raise LoadError(f"{path} cannot be loaded: {error} Save it again with calque.save.") from error


def _assembled(path: FilePath, network: Network, plan: Plan, table: Mapping[str, Any], tensors: Tensors) -> Assembled:
    """The network with the file's layers, grids and float tensors in it."""
    with _naming(path):
        check_plan(network, plan)
        edges = place(network, plan, table["placement"])
    if {edge.name for edge in edges} != set(table["grids"]):
        raise _moved_grids(path, table)
    device = next(iter(tensors.values())).device
    with _naming(path):
        check_grids(edges, table["grids"])
        quantizers = {edge.name: _quantizer(table["grids"][edge.name], device) for edge in edges}
        result = assemble(network, edges, _layers(network, table, tensors), quantizers, plan)
        _restore_float(result, tensors)
        check_scales(result.layers)
        if table["report"] is not None:
            check_ranges(result.layers, result.quantizers, table["report"])
    if grids(result.graph_module, result.edges) != table["grids"]:
        raise _moved_grids(path, table)
    return result


def _tensors(q: QuantizedModel) -> Tensors:
    """What is stored of the network, by key: codes packed."""
    result: Tensors = {}
    for name, layer in q.layers.items():
        result[f"layer:{name}:codes"] = pack(layer.codes.cpu(), layer.bits)
        result[f"layer:{name}:scale"] = layer.scale
        result[f"layer:{name}:bias"] = layer.bias
        if layer.bias_scale is not None:
            result[f"layer:{name}:bias_scale"] = layer.bias_scale
    result.update({f"float:{name}": tensor for name, tensor in left_float(q.graph_module)})
    return {key: value.detach().cpu().contiguous().clone() for key, value in result.items()}


def _capture(path: FilePath, model: nn.Module, example: Batch, table: Mapping[str, Any]) -> Network:
    blank = duplicate(model)  # with the weights at hand, values might overflow, and no trace could be checked
    for parameter in blank.parameters():
        parameter.data.zero_()
    try:
        batch = laid_out(Signature.of(model).bind((), example), _layout(table))
        return capture(blank, batch, _dynamic(table))
    except Exception as error:  # whatever its forward raises on inputs that it was not made for
        modules, problems = dict(model.named_modules()), []
        for name, layer in table["layers"].items():
            weight = getattr(modules.get(name.partition("#")[0]), "weight", None)
            if isinstance(weight, Tensor) and list(weight.shape) != layer["shape"]:
                problems.append(shapes(f"layer {name}", layer["shape"], weight))
        known = isinstance(error, CalqueError)
        reason = str(error) if known else f"it fails on the inputs: {type(error).__name__}: {error}"
        raise _misfit(path, [*problems, " ".join(reason.split()).rstrip(".")]) from error


def _dynamic(table: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    return {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in table["dynamic"].items()}


def _equal_axes(table: Mapping[str, Any]) -> tuple[tuple[Axis, ...], ...] | None:
    """None for files from before it was stored."""
    stored = table.get("equal_axes")
    return None if stored is None else tuple(tuple((name, axis) for name, axis in group) for group in stored)


def _layout(table: Mapping[str, Any]) -> Layout | None:
    stored = table.get("layout")
    return None if stored is None else Layout(**{**stored, "whole": frozenset(stored["whole"])})


def _misfit(path: FilePath, problems: list[str]) -> LoadError:
    return LoadError(
        f"{path} does not fit the network: {'; '.join(problems)}. Pass the architecture it was saved from."
    )


def _moved_grids(path: FilePath, table: Mapping[str, Any]) -> LoadError:
    return LoadError(
        f"{path} was written by calque {table['versions']['calque']}, which placed the grids otherwise than "
        f"this version ({version('calque')}). Quantize again with its plan."
    )


def _layers(network: Network, table: Mapping[str, Any], tensors: Tensors) -> dict[str, QuantizedLayer]:
    layers = {}
    for name, stored in table["layers"].items():
        key, bits = f"layer:{name}", stored["bits"]
        codes = unpack(tensors[f"{key}:codes"], bits, tuple(stored["shape"]))
        scale, bias, bias_scale = (
            tensors[f"{key}:scale"],
            tensors[f"{key}:bias"],
            tensors.get(f"{key}:bias_scale"),
        )
        geometry = network.weighted(name).geometry
        layers[name] = QuantizedLayer(geometry, codes, scale, bias, bias_scale, bits=bits)
    return layers


def _restore_float(q: Assembled, tensors: Tensors) -> None:
    """Puts, in place, the stored tensors where the architecture's own weights are."""
    for name, _ in list(left_float(q.graph_module)):
        path, _, leaf = name.rpartition(".")
        owner = q.graph_module.get_submodule(path)
        delattr(owner, leaf)
        owner.register_buffer(leaf, tensors[f"float:{name}"].clone())


def _quantizer(grid: Mapping[str, Any], device: torch.device) -> Quantizer:
    scale = torch.tensor(grid["scale"], dtype=torch.float32, device=device)
    return Quantizer(scale, torch.tensor(grid["zero_point"], device=device), bits=grid["bits"])
