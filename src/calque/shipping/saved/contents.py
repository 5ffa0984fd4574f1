"""What the tensors of a file must be: of the types, shapes and ranges that its metadata and its network give them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from calque.errors import SpecError
from calque.grid.arithmetic import BIAS_LIMIT, SMALLEST_SCALE
from calque.grid.bits import Bits, Plan, check_entry
from calque.network import Network
from calque.network.spelling import respellings
from calque.network.tensors import named_tensors
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.quantized.placement import Edge
from calque.run.fields import inside, require, shown
from calque.shipping.saved.architecture import left_float
from calque.shipping.saved.file import Tensors
from calque.shipping.saved.rules import DTYPES, LARGEST_SCALE, tensor_forms

Table = Mapping[str, Any]
SAME = 1e-5  # relative: a scale that was derived from its product differs by rounding errors
PARTS = ("codes", "scale", "bias", "bias_scale")


def check_tensors(table: Table, tensors: Tensors) -> None:
    """Raises SpecError where a tensor of a layer or an input breaks a rule, is missing, or has no place.

    Args:
        tensors: as stored; aliases are not yet in their places.
    """
    expected = {f"layer:{name}:{part}" for name in table["layers"] for part in _parts(table, name)}
    for name, key in table["aliases"].items():
        known = name in expected or name.startswith("float:")
        if not known or name in tensors or key not in tensors:
            raise SpecError(
                f"{inside('aliases', name)} must lead from a tensor that is left out to one that is there. Got {shown(key)}."
            )
    everything = {**tensors, **{name: tensors[key] for name, key in table["aliases"].items()}}
    inputs = {
        form["tensor"]: (inside("inputs", name), form)
        for name, form in tensor_forms(table)
        if not DTYPES[form["dtype"]].is_floating_point
    }
    for key in everything:
        if key not in expected and key not in inputs and not key.startswith("float:"):
            raise SpecError(f"{shown(key)} is a tensor that nothing reads.")
    for name in table["layers"]:
        _check_layer(name, table, everything)
    for key, (where, form) in inputs.items():
        _check_input(where, form, everything.get(key))


def _parts(table: Table, name: str) -> tuple[str, ...]:
    """What is stored of a layer: biases on a grid have a scale of their own."""
    return PARTS if Bits.parse(table["plan"][name]).activation is not None else PARTS[:3]


def _check_input(where: str, form: Mapping[str, Any], value: Tensor | None) -> None:
    if value is None:
        raise SpecError(f"{where} has no tensor {shown(form['tensor'])} in the file.")
    fits = value.dtype == DTYPES[form["dtype"]] and list(value.shape) == form["shape"]
    require(fits, where, f"{value.dtype} {list(value.shape)}, as its tensor is", [form["dtype"], *form["shape"]])


def _check_layer(name: str, table: Table, tensors: Tensors) -> None:
    stored, bits = table["layers"][name], Bits.parse(table["plan"][name])
    shape, found = stored["shape"], {}
    for part in _parts(table, name):
        key = f"layer:{name}:{part}"
        if key not in tensors:
            raise SpecError(f"the tensor {shown(key)} is missing.")
        found[part] = tensors[key]
    packed, channels = -(-math.prod(shape) * stored["bits"] // 8), shape[0]
    groups = [] if bits.group is None else [shape[1] // bits.group]
    on_grid = "bias_scale" in found
    _require_form(f"layer:{name}:codes", found["codes"], torch.uint8, [packed])
    _require_form(f"layer:{name}:scale", found["scale"], torch.float32, [channels, *groups])
    biases = [] if on_grid or found["bias"].numel() else [0]  # a table has none
    _require_form(f"layer:{name}:bias", found["bias"], torch.int32 if on_grid else torch.float32, biases or [channels])
    _require_scale(f"layer:{name}:scale", found["scale"])
    if on_grid:
        _require_form(f"layer:{name}:bias_scale", found["bias_scale"], torch.float32, [channels])
        _require_scale(f"layer:{name}:bias_scale", found["bias_scale"])
        _require_all(
            f"layer:{name}:bias", found["bias"], found["bias"].long().abs() <= BIAS_LIMIT, "from -2^30 to 2^30"
        )
    else:
        _require_all(f"layer:{name}:bias", found["bias"], torch.isfinite(found["bias"]), "finite")


def _require_form(key: str, value: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if value.dtype != dtype or list(value.shape) != shape:
        raise SpecError(f"{shown(key)} must be {dtype} {shape}. Got {value.dtype} {list(value.shape)}.")


def _require_scale(key: str, value: Tensor) -> None:
    fits = (value >= SMALLEST_SCALE) & (value <= LARGEST_SCALE)
    _require_all(key, value, fits, f"finite and at least {SMALLEST_SCALE:.3g}")


def _require_all(key: str, value: Tensor, fits: Tensor, rule: str) -> None:
    if not bool(fits.all()):
        raise SpecError(f"every value of {shown(key)} must be {rule}. Got {value[~fits][0].item()}.")


def check_plan(network: Network, plan: Plan) -> None:
    """Raises SpecError where the plan lacks a layer, or gives something bits that it cannot have."""
    tensors = named_tensors(network)
    for name in network.layers:
        if name not in plan:
            raise SpecError(f"{inside('plan', name)} is missing.")
    for name, bits in plan.items():
        where = inside("plan", name)
        is_layer = name in network.layers
        if not is_layer and name not in tensors and name not in network.products:
            raise SpecError(f"{where} names nothing in the network that has bits.")
        try:
            check_entry(name, bits, is_layer=is_layer)
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from error


def check_grids(edges: Sequence[Edge], grids: Mapping[str, Any]) -> None:
    """Raises SpecError where a grid has other bits than the plan gives its tensor."""
    for edge in edges:
        require(
            grids[edge.name]["bits"] == edge.bits,
            f"{inside('grids', edge.name)}.bits",
            f"{edge.bits}, as in the plan",
            grids[edge.name]["bits"],
        )


def check_floats(network: Network, model: nn.Module, tensors: Tensors) -> None:
    """Raises SpecError where a tensor that stays float has no place in the network, another type, or is not finite.

    Constants and buffers may be infinite where the architecture's own are: masks.
    """
    floats = dict(left_float(network.module))
    spelled = respellings(model)
    norms = [path for path, module in model.named_modules() if isinstance(module, _NormBase)]
    strict = {spelled.get(name, name) for name, _ in model.named_parameters()}
    strict |= {f"{spelled.get(path, path)}.{leaf}" for path in norms for leaf in ("running_mean", "running_var")}
    strict |= {f"{name}.{part}" for name in network.layers for part in ("weight", "bias")}
    for key, value in tensors.items():
        name = key.removeprefix("float:")
        if name == key:
            continue
        if name not in floats:
            raise SpecError(f"{shown(key)} is a tensor that nothing in the network reads.")
        if value.dtype != floats[name].dtype:
            raise SpecError(f"{shown(key)} must be {floats[name].dtype}, as in the network. Got {value.dtype}.")
        if value.is_floating_point() or value.is_complex():
            infinite = torch.isinf(value) & (False if name in strict else torch.isinf(floats[name]))
            _require_all(key, value, torch.isfinite(value) | infinite, "finite")


def check_scales(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raises SpecError where a bias is on another grid than the sums that it is added to."""
    for name, layer in layers.items():
        grid, own = layer.source, layer.bias_scale
        if own is not None and grid is not None and not torch.allclose(own, grid.scale * layer.scale, SAME, 0):
            raise SpecError(
                f"{shown(f'layer:{name}:bias_scale')} must be the scale of the layer's input, {grid.scale.item():.6g}, times "
                "that of its weights."
            )


def check_ranges(layers: Mapping[str, QuantizedLayer], grids: Mapping[str, Quantizer], report: Table) -> None:
    """Raises SpecError where a grid has another range than the report says."""
    for name, (bits, low, high) in report["tensors"].items():
        where = inside("report.tensors", name)
        if name not in grids:
            raise SpecError(f"{where} names no grid of the network.")
        require(bits == f"a{grids[name].bits}", where, f"of the grid's {grids[name].bits} bits", bits)
        _require_range(where, grids[name], low, high)
    for index, layer in enumerate(report["layers"]):
        part = layers.get(layer["name"])
        if layer["low"] is not None:
            where = f"report.layers[{index}]"
            if part is None or part.source is None:
                raise SpecError(
                    f"{where} has a range, but no quantized layer on a grid is called {shown(layer['name'])}."
                )
            _require_range(where, part.source, layer["low"], layer["high"])


def _require_range(where: str, grid: Quantizer, low: float, high: float | None) -> None:
    ends = f"{low} to {high}"
    require((low, high) == grid.range, where, f"of the grid's range, {grid.range[0]} to {grid.range[1]}", ends)
