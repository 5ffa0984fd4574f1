"""A finished run as a report: what was decided and gained, and what deserves attention."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from torch import Tensor, nn

from calque.allocation.costs import float_size, values_outside_layers
from calque.allocation.filenodes import guessed_operators
from calque.allocation.filesize import file_size
from calque.calibration.fidelity import held_out_fidelity
from calque.calibration.job import Job
from calque.errors import warn
from calque.gains import Fidelity
from calque.network import Network
from calque.network.batching import layout_notes
from calque.pipeline.build import Built
from calque.pipeline.search import Found
from calque.quantized.assembled import Assembled, compiled, grid_of
from calque.quantized.left_float import float_operators
from calque.recipe import Recipe
from calque.report import LayerReport, Report
from calque.settings import ClosedForm


def summarize(
    model: nn.Module,
    job: Job,
    recipe: Recipe,
    built: Built,
    found: Found | None,
    *,
    references: Sequence[Sequence[Tensor]],
    phases: Mapping[str, float],
    loss: str,
) -> Report:
    """The report of a run.

    Args:
        model: the user's, which may be in train mode.
        found: what the search for bits left, under a budget.
        references: the float network's output leaves on each batch.
        phases: seconds of what came before.
    """
    result, network, tuned = built.model, job.network, built.tuned
    tensors = {
        name: (f"a{quantizer.bits}", *quantizer.range)
        for name, quantizer in result.quantizers.items()
        if name in result.plan or name.rpartition(".")[0] in network.products
    }
    other = 4 * values_outside_layers(network)
    searched = {} if found is None else found.phases
    on_disk = file_size(network, dict(result.plan.items()), job.placement, _computed_scales(result))
    limit = None if found is None else found.limit
    started = time.perf_counter()
    fidelity = _fidelity(job, recipe, result, references)
    measured = {"fidelity": time.perf_counter() - started}
    return Report(
        recipe.name, job.placement, job.seed, job.inputs, _layers(built, found), tensors, float_size(network) + other, other,
        {**phases, **searched, **built.phases, **measured},
        (*_notes(model, job, built, found), *_file_notes(network, on_disk, limit)),
        {"calque": version("calque"), "torch": torch.__version__}, loss=loss,
        finalists=() if found is None else found.finalists, distilled=built.distilled,
        tuned=None if tuned is None else (tuned.before, tuned.after), fidelity=fidelity,
        file_size=on_disk, file_limit=limit,
    )  # fmt: skip


def _fidelity(job: Job, recipe: Recipe, result: Assembled, references: Sequence[Sequence[Tensor]]) -> Fidelity | None:
    """What quantization cost the outputs. Closed forms are fitted to all inputs in the end: what they chose between is gone."""
    evaluate = compiled(result.graph_module)
    return held_out_fidelity(
        lambda inputs: list(job.network.module(*inputs)), lambda inputs: evaluate(result.graph_module, *inputs),
        job.batches, references, job.network.out_spec, fitted=isinstance(recipe.fit, ClosedForm),
    )  # fmt: skip


def _computed_scales(model: Assembled) -> list[str]:
    """Layers whose bias scales are exactly the products of their input's scale and their own."""
    found = []
    for name, layer in model.layers.items():
        (node,) = model.graph_module.graph.find_nodes(op="call_module", target=name)
        grid = grid_of(model.graph_module, node.all_input_nodes[0])
        if (
            grid is not None
            and layer.bias_scale is not None
            and torch.equal(grid.scale * layer.scale, layer.bias_scale)
        ):
            found.append(name)
    return found


def _layers(built: Built, found: Found | None) -> tuple[LayerReport, ...]:
    """What the sweep reported, with the ranges that later stages gave the inputs' grids, and the prices of the chosen bits."""
    reports = tuple(_ranged(report, built.model) for report in built.layers)
    if found is None:
        return reports
    prices = {
        names[0]: dict(zip(options, increases, strict=True))
        for names, options, increases in zip(
            found.prices.groups, found.prices.choices, found.prices.increases, strict=True
        )
    }
    return tuple(
        replace(report, price=prices[report.name][report.bits]) if report.name in prices else report
        for report in reports
    )


def _ranged(report: LayerReport, model: Assembled) -> LayerReport:
    layer = model.layers.get(report.name)
    if report.low is None or layer is None or layer.source is None:
        return report
    low, high = layer.source.range
    return replace(report, low=low, high=high)


def _notes(model: nn.Module, job: Job, built: Built, found: Found | None) -> list[str]:
    network, fitted = job.network, built.fitted
    notes = [
        *layout_notes(network.signature.layout),
        *job.notes,
        *network.left_float,
        *float_operators(built.model, network),
        *fitted.notes,
        *(() if found is None else found.notes),
    ]
    if any(module.training for module in model.modules()):
        notes.insert(0, "the model was in train mode; its eval mode was quantized.")
    for name in network.unreached:
        notes.append(f"layer {name} is never reached by forward on these inputs; it is not part of the result.")
        warn(notes[-1] + " Check the calibration inputs.")
    notes.extend(_filled(network, built.model))
    if fitted.unmoved:
        notes.append(f"no fit beat rounding to nearest on the held-out inputs: {', '.join(fitted.unmoved)}.")
    if fitted.weak:
        cases = ", ".join(f"{name} ({rows_} rows for {unknowns})" for name, (rows_, unknowns) in fitted.weak.items())
        notes.append(f"fewer calibration rows than unknowns per output, so that a fit may over-fit: {cases}.")
        warn(notes[-1] + " Pass more inputs; held-out ones guard the fit.")
    return notes


def _file_notes(network: Network, on_disk: int, limit: int | None) -> list[str]:
    """Why the file may be larger than a budget allows."""
    if limit is None:
        return []
    notes = []
    if on_disk > limit:
        notes.append(
            f"the file may take {on_disk:,} bytes, more than the budget's {limit:,}. Lower the size by as much."
        )
    guessed = guessed_operators(network)
    if guessed:
        notes.append(
            f"the bytes of these operators in the file are guessed, so that the budget may be exceeded: {', '.join(guessed)}. "
            "Compare the exported file with it."
        )
    return notes


def _filled(network: Network, result: Assembled) -> list[str]:
    """A sentence on weights that are exactly zero, as pruning leaves them, and that the fits moved."""
    names, zeros, moved = [], 0, 0
    for name, layer in result.layers.items():
        pruned = network.weighted(name).weight == 0
        filled = int((pruned & (layer.codes != 0)).sum())
        if filled:
            names.append(name)
            zeros, moved = zeros + int(pruned.sum()), moved + filled
    if not names:
        return []
    return [
        f"{moved:,} of {zeros:,} weights that are zero (pruned) are so no longer, in {', '.join(names)}: the fits use them. "
        'recipe="nearest" keeps every zero.'
    ]
