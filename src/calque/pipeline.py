"""The method on one screen: capture, decide the bits, quantize layer by layer, re-estimate statistics, report."""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version

import torch
from torch import nn

from calque.calibration import Store, parse_bytes, prepare, varying_axes
from calque.errors import CalibrationWarning, SpecError
from calque.graph import Batch, DynamicAxes, Network, Signature, capture
from calque.graph.signature import rows, select
from calque.model import QuantizedModel, assemble, parameters_left_float
from calque.placement import Edge, place, shared_tensors
from calque.recipe import Recipe, find_recipe
from calque.report import Report
from calque.spec import FLOAT, Bits, Placement, Plan, apply_overrides, check_entry, uniform
from calque.statistics import para_normalize
from calque.sweep import Sweep, Swept

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all

DEFAULT_BITS = "w8a8"
EXAMPLE_ROWS = 3  # of the inputs that a saved network is captured with again


def quantize(
    model: nn.Module,
    calibration: object,
    *,
    bits: str | None = None,
    plan: Plan | None = None,
    override: Mapping[str, str | None] | None = None,
    recipe: str | Recipe | None = None,
    placement: Placement = "integer",
    first_last: str | None = "auto",
    dynamic: DynamicAxes | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: str = "2GB",
    progress: Progress | None = None,
) -> QuantizedModel:
    """A quantized copy of `model`, fitted on `calibration`; the model itself is left untouched.

    Source: Hubara et al. 2021 (ICML), the sequential pipeline; see the recipe for deviations.

    Args:
        model: a float32 network with Conv2d and Linear layers.
        calibration: unlabelled inputs: a tensor (N, ...), a list or DataLoader of batches; a batch is a tensor, a tuple of
            positional arguments (cut to the parameters that forward requires) or a dict of keyword arguments.
        bits: "w<bits>a<bits>" with 2 to 8 bits, or "w<bits>" for weights alone. Default "w8a8", unless there is a plan.
        plan: bits by layer and tensor name, in place of `bits`.
        override: glob pattern of names -> bits, or None for float.
        recipe: "nearest", "sequential" (the default), a TOML file or a Recipe.
        placement: "integer" (all operands of integer kernels) or "inputs" (inputs of weighted layers, as in the paper).
        first_last: bits of the first and last layer; "auto" is "w8a8" ("w8" without activations) at fixed bits and nothing
            special under a plan, None is nothing special.
        dynamic: axes besides the batch that may change, as torch.export's dynamic_shapes: {"x": {2: Dim.AUTO}}. Axes
            whose sizes differ between calibration batches are found by themselves.
        seed: of the sampling; the same seed gives the same codes on a CPU with the same number of threads.
        device: where to compute; the default is where the model is.
        memory: for values between two operators, in RAM; what exceeds it goes to disk.
        progress: called with (phase, steps done, steps in all).

    Returns:
        An nn.Module with the original's signature, in eval mode, with `report` and `plan`.

    Raises:
        SpecError: bits, plan, override or an option that breaks a rule.
        CaptureError: a network that cannot be captured.
        CalibrationError: inputs that are empty, not finite or of the wrong form.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> q = quantize(net, torch.randn(64, 1, 4, 4), bits="w8a8", recipe="nearest")
    >>> q(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 2])
    """
    started = time.perf_counter()
    chosen = find_recipe(recipe)
    if placement not in ("integer", "inputs"):
        raise SpecError(f'placement is "integer" or "inputs". Got {placement!r}.')
    place_of_model = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    target = _device(device) if device is not None else place_of_model
    batches = prepare(calibration, Signature.of(model), target)
    axes = {**varying_axes(batches), **(dynamic or {})}
    network = capture(_moved(model, target), batches[0], axes)
    if not network.layers:
        raise SpecError(
            "the network has no Conv2d or Linear layer with constant weights: there is nothing to quantize."
        )
    entries = decide_bits(network, bits=bits, plan=plan, override=override, first_last=first_last)
    edges = place(network, entries, placement)
    captured = time.perf_counter()
    show = progress or (lambda phase, done, total: None)
    with Store(parse_bytes(memory)) as store:
        swept = Sweep(network, entries, edges, chosen, batches, store, seed).run(
            _counter(show, "fit", len(network.layers))
        )
    fitted = time.perf_counter()
    final = Plan(_final_entries(network, entries, edges))
    result = assemble(network, edges, swept.layers, swept.quantizers, final)
    example = select(batches[0], torch.arange(EXAMPLE_ROWS) % rows(batches[0]))
    result.facts |= {"placement": placement, "example": example, "dynamic": axes}
    if chosen.normalize:
        before = {name: layer.codes.clone() for name, layer in result.layers.items()}
        with Store(parse_bytes(memory)) as store:
            para_normalize(
                result.graph_module,
                swept.statistics,
                batches,
                store,
                _counter(show, "statistics", len(swept.statistics)),
            )
        assert all(torch.equal(layer.codes, before[name]) for name, layer in result.layers.items())
    phases = {
        "capture": captured - started,
        "fit": fitted - captured,
        "statistics": time.perf_counter() - fitted,
    }
    notes = _notes(model, network, swept)
    result.report = _report(result, swept, network, batches, chosen, placement, seed, phases, notes)
    return result


def decide_bits(
    network: Network,
    *,
    bits: str | None,
    plan: Plan | None,
    override: Mapping[str, str | None] | None,
    first_last: str | None,
) -> dict[str, Bits]:
    """Bits of every layer by name, and of the tensors that a plan or an override names.

    Raises:
        SpecError: both bits and a plan; a plan that lacks a layer or has a name that the network does not have; see also
            `apply_overrides`.
    """
    names = list(network.layers)
    tensors = list(shared_tensors(network).values())
    if plan is not None:
        if bits is not None:
            raise SpecError("bits and plan exclude each other: a plan has the bits of every layer. Drop one of them.")
        missing, unknown = (
            [n for n in names if n not in plan],
            [n for n in plan if n not in (*names, *tensors)],
        )
        if missing or unknown:
            raise SpecError(f"the plan must name the network's layers. Missing: {missing}; unknown: {unknown}.")
        entries = {name: check_entry(name, plan[name], is_layer=name in names) for name in plan}
        ends = None if first_last == "auto" else first_last
    else:
        parsed = Bits.parse(DEFAULT_BITS if bits is None else bits)
        check_entry("bits", parsed, is_layer=True)
        entries = dict.fromkeys(names, parsed)
        automatic = "w8" if parsed.activation is None else "w8a8"
        ends = (None if parsed == FLOAT else automatic) if first_last == "auto" else first_last
    if ends is not None:
        both = check_entry("first_last", Bits.parse(ends), is_layer=True)
        entries.update({name: uniform(names, both, both)[name] for name in (names[0], names[-1])})
    return apply_overrides(entries, override or {}, tensors)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros((), device=found)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    tensors = (*model.parameters(), *model.buffers())
    if all(tensor.device == device for tensor in tensors):
        return model
    return copy.deepcopy(model).to(device)


def _counter(progress: Progress, phase: str, total: int) -> Callable[[str], None]:
    done = 0

    def count(_: str) -> None:
        nonlocal done
        done += 1
        progress(phase, done, total)

    return count


def _final_entries(network: Network, entries: Mapping[str, Bits], edges: list[Edge]) -> dict[str, Bits]:
    """Bits of every layer and of every tensor with a grid of its own, in the graph's order; floats that were asked for."""
    tensors = {edge.name: Bits(None, edge.bits) for edge in edges if edge.kind == "tensor"}
    asked = {name: bits for name, bits in entries.items() if name not in network.layers and bits == FLOAT}
    return {**{name: entries[name] for name in network.layers}, **tensors, **asked}


def _notes(model: nn.Module, network: Network, swept: Swept) -> list[str]:
    notes = [*network.left_float, *swept.notes]
    if any(module.training for module in model.modules()):
        notes.insert(0, "the model was in train mode; its eval mode was quantized.")
    for name in network.unreached:
        notes.append(f"layer {name} is never reached by forward on these inputs; it is not part of the result.")
        warnings.warn(notes[-1] + " Check the calibration inputs.", CalibrationWarning, stacklevel=3)
    if swept.weak:
        cases = ", ".join(f"{name} ({rows_} rows for {unknowns})" for name, (rows_, unknowns) in swept.weak.items())
        notes.append(f"fewer calibration rows than unknowns per output, so that a fit may over-fit: {cases}.")
        warnings.warn(notes[-1] + " Pass more inputs; held-out ones guard the fit.", CalibrationWarning, stacklevel=3)
    return notes


def _report(
    result: QuantizedModel,
    swept: Swept,
    network: Network,
    batches: list[Batch],
    recipe: Recipe,
    placement: Placement,
    seed: int,
    phases: dict[str, float],
    notes: list[str],
) -> Report:
    tensors = {
        name: (f"a{quantizer.bits}", *quantizer.range)
        for name, quantizer in result.quantizers.items()
        if name in result.plan
    }
    parameters = {
        name: module.weight.numel() + module.bias.numel()
        for name, module in ((name, network.weighted(name)) for name in network.layers)
    }
    in_layers = sum(count for name, count in parameters.items() if result.plan[name].weight is None)
    other = 4 * (parameters_left_float(result) - in_layers)
    whole = 4 * sum(count for name, count in parameters.items() if name not in network.shared)
    return Report(
        recipe.name, placement, seed, sum(rows(batch) for batch in batches), tuple(swept.reports), tensors,
        whole + other, other, phases, tuple(notes), {"calque": version("calque"), "torch": torch.__version__},
    )  # fmt: skip
