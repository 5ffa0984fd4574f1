"""The method on one screen: capture, decide the bits, quantize layer by layer, re-estimate statistics, tune biases, report."""

import glob
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calque.allocation.budget import Budget
from calque.calibration.batches import prepare
from calque.calibration.job import EXAMPLE_ROWS, Job
from calque.calibration.losses import LossName, OutputLoss, check_loss, find_loss
from calque.errors import CaptureError, CaptureWarning, SpecError, warn
from calque.fitting.channel_scales.smoothing import smooth
from calque.fitting.parallel import Choices
from calque.grid.bits import Bits, Placement, Plan
from calque.network import Batch, DynamicAxes, Network, Signature
from calque.network.axes import capture_with, check_dynamic, merged
from calque.network.batching import equal_axes, find_layout, varying_axes
from calque.network.copies import moved_to
from calque.network.signature import flatten, rows, select
from calque.network.surroundings import require_exact_products, undisturbed
from calque.pipeline.build import build
from calque.pipeline.end_to_end import trained_end_to_end
from calque.pipeline.estimate import forecast
from calque.pipeline.finished import keep_result, kept_result, open_pieces
from calque.pipeline.guard import guard
from calque.pipeline.options import check_options, find_device
from calque.pipeline.outliers import healthy
from calque.pipeline.parts import quantize_parts
from calque.pipeline.search import check_budget, search
from calque.pipeline.stages import Stages
from calque.pipeline.summary import summarize
from calque.quantized.admission import require_call, require_inputs, require_original
from calque.quantized.decisions import DEFAULT_BITS, asked_layers, decide_bits, decide_choices
from calque.quantized.model import Facts, QuantizedModel
from calque.quantized.partly import PartlyQuantized
from calque.recipe import Recipe, find_recipe
from calque.run.checkpoint import alone
from calque.run.files import FilePath
from calque.run.progress import Progress, Watch, check_progress, watched
from calque.run.spill import Store, parse_bytes

log = logging.getLogger(__name__)


@undisturbed
def quantize(
    model: nn.Module,
    calibration: object,
    *,
    bits: str | Sequence[str] | None = None,
    budget: Budget | None = None,
    plan: Plan | None = None,
    override: Mapping[str, str | None] | None = None,
    recipe: str | Recipe | None = None,
    placement: Placement = "integer",
    first_last: str | None = "auto",
    loss: LossName | OutputLoss | None = None,
    dynamic: DynamicAxes | None = None,
    run: FilePath | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: str = "2GB",
    workers: int | None = None,
    progress: Progress | bool | None = None,
) -> QuantizedModel:
    """A quantized copy of `model`, fitted on `calibration`; the model itself is left untouched.

    Source: Hubara et al. 2021 (ICML); see the recipe for deviations.

    Args:
        model: a float32 network; the README's Limits list the layers that are quantized.
        calibration: unlabelled inputs: a tensor or NumPy array (N, ...) (float64 arrays become float32), a Dataset of single
            samples without a batch axis, a list or DataLoader of batches; a batch is a tensor, a tuple of positional
            arguments (cut to the parameters that forward requires) or a dict of keyword arguments (cut to those that
            forward has; the report names the others). Of what has no length, such as a generator, at most 20,000 batches or
            8 GB are taken. Rows that alone would decide a range are left out; a
            CalibrationWarning and the report name them by their numbers.
        bits: "w<bits>a<bits>" with 2 to 8 bits, or "w<bits>" for weights alone. Several of them are the candidates that a
            budget chooses from. Default "w8a8", unless there is a plan.
        budget: what the network may cost; each layer then gets one of the candidates by an integer program over measured
            prices, the ends included.
        plan: bits by layer and tensor name, in place of `bits`.
        override: glob pattern of names -> bits, or None for float.
        recipe: "nearest", "light", "fast" (the default), "accurate", "sequential", "advanced", "paper-2021", a TOML
            file or a Recipe.
        placement: "integer" (all operands of integer kernels) or "inputs" (inputs of weighted layers, as in the paper).
        first_last: bits of the first and last layer, and of the last one in front of each of several outputs; "auto" is "w8a8"
            ("w8" without activations) at fixed bits and nothing special under a budget or a plan, None is nothing special.
        loss: "kl", "mse" or a differentiable function of the float and the quantized outputs; what prices and the tuning of
            biases are judged by. Default: mse (docs/experiments.md), the squared error over the float output's power.
        dynamic: axes besides the batch that may change, as torch.export's dynamic_shapes: {"x": {2: Dim.AUTO}}. Axes
            whose sizes differ between calibration batches are found by themselves. An axis that does not fit is an error.
        run: a folder for finished pieces; the same call with the same folder goes on after a kill, and returns the same
            result at once where the run is finished.
        seed: of the sampling; the same seed gives the same codes on a CPU with the same number of threads, unless the
            recipe is bounded in minutes (accurate): the report names the steps that reproduce it.
        device: where to compute; the default is where the model is.
        memory: for values between two operators, in RAM; what exceeds it goes to disk.
        workers: processes of one thread each that fit layers independently (parallel AdaQuant), by joblib's backend; the
            codes do not depend on their number. None fits in this process.
        progress: called with (phase, steps done, steps in all). None draws a bar on a terminal or in a notebook, True also
            writes lines where neither is, False shows nothing.

    Returns:
        An nn.Module with the original's signature, in eval mode, with `report`, `plan` and, under a budget, `prices`. Where the
        network cannot be captured whole, a `PartlyQuantized`, and a CaptureWarning: its largest sub-modules that can be are
        quantized in place, at fixed bits and the default loss, and the report says what stays float and why.

    Raises:
        SpecError: bits, plan, override or an option that breaks a rule; a `run` folder of another run.
        InfeasibleBudgetError: a budget that no allocation keeps; the smallest feasible one is named.
        CaptureError: a network of which nothing can be captured, or not the whole with a budget, plan, loss, dynamic or `run`.
        SurroundingsError: what the call stands in and cannot leave, a default dtype of float64 for one.
        CalibrationError: inputs that are empty, endless, not finite or of the wrong form, or that the model itself refuses.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> q = quantize(net, torch.randn(64, 1, 4, 4), bits="w8a8", recipe="nearest")
    >>> q(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 2])
    """
    started = time.perf_counter()
    options: dict[str, Any] = {"bits": bits, "recipe": recipe, "placement": placement, "seed": seed, "workers": workers}
    check_options(
        {**options, "budget": budget, "plan": plan, "override": override, "first_last": first_last, "dynamic": dynamic}
    )
    require_inputs(model, calibration)
    check_progress(progress)
    check_loss(loss)
    require_original(model)
    target = _target(model, device)
    require_exact_products(target)
    notes: list[str] = []
    batches = prepare(
        calibration, Signature.of(model), target,
        find=lambda items: find_layout(moved_to(model, target), items), on_note=notes.append,
    )  # fmt: skip
    found_axes, given_axes = varying_axes(batches), check_dynamic(dynamic, batches[0])
    with watched(progress) as watch:  # after the inputs: a bar has a thread, and loaders may fork
        watch.begin("capture")
        try:
            network = _captured(model, batches[0], found_axes, given_axes)
        except CaptureError as error:
            require_call(model, batches[0])
            if any(option is not None for option in (budget, plan, loss, run, given_axes or None)):
                raise CaptureError(
                    f"{error} Without a budget, plan, loss, run folder and dynamic axes, calque.quantize quantizes the largest "
                    "sub-modules that can be captured."
                ) from error
            options |= {"memory": memory, "device": device, "progress": watch}
            return _in_parts(model, batches, error, override or {}, first_last, options, notes)
        choices, entries = _decided(
            network, bits, plan, override=override, first_last=first_last, search=budget is not None
        )
        chosen = find_recipe(recipe)
        job = Job(
            network, batches, placement, seed, parse_bytes(memory), workers=workers, progress=watch, notes=tuple(notes)
        )
        if budget is not None:
            check_budget(job, choices, entries, budget)
        # no budget among these: pieces do not depend on it, so that another one goes on from the same prices
        text = plan and plan.to_toml()
        asked: dict[str, object] = {"bits": bits, "plan": text, "override": override, "first_last": first_last}
        axes = merged(found_axes, given_axes)
        asked |= {"loss": loss, "dynamic": {name: [*where] for name, where in sorted(axes.items())}}
        checkpoint = open_pieces(run, job, chosen, asked)
        with alone(checkpoint), job.outputs_store() as store:
            ready = kept_result(checkpoint, budget, moved_to(model, target))
            if ready is not None:
                return ready
            job = replace(job, checkpoint=checkpoint)
            kept = asked_layers(network, plan, override or {})
            result = _quantized(
                model, job, choices, entries, store,
                recipe=chosen, kept=kept, budget=budget, loss=loss, dynamic=axes, started=started, watch=watch,
            )  # fmt: skip
            keep_result(checkpoint, budget, result)
    return result


def _quantized(
    model: nn.Module,
    job: Job,
    choices: Choices,
    entries: Mapping[str, Bits],
    store: Store,
    *,
    recipe: Recipe,
    kept: Collection[str],
    budget: Budget | None,
    loss: LossName | OutputLoss | None,
    dynamic: DynamicAxes,
    started: float,
    watch: Watch,
) -> QuantizedModel:
    """The method, on a captured network: inputs, ranges, bits, fits, report.

    Args:
        model: the user's.  store: for the float network's outputs.
        kept: layers whose bits the user asked for.  dynamic: free axes besides the batch.  started: when the call began.
    """
    captured = time.perf_counter()
    watch.begin("float pass")
    tensors = {name: entry for name, entry in entries.items() if name not in job.network.layers}
    job, references, extremes = healthy(job, store)
    float_pass = time.perf_counter() - captured
    stages = Stages.of(recipe)
    if stages.channel_scales:
        smoothed, moved = smooth(job, choices)
        job, extremes = replace(job, network=smoothed), {} if moved else extremes
    guarded = guard(job, choices, tensors, extremes, kept=kept)
    job = replace(job, network=guarded.network, notes=(*job.notes, *guarded.notes))
    choices, entries = guarded.applied(choices, entries)
    loss_name, function = find_loss(loss, references[0], job.network.out_spec)
    expected = forecast(
        job, choices, recipe, float_pass, search=budget is not None, spent=time.perf_counter() - started
    )
    log.info("%s", expected)
    watch.expect(expected.phases)
    if budget is None:
        built, found = build(job, entries, stages, references), None
        built = trained_end_to_end(job, built, recipe, function, references)
    else:
        found = search(job, choices, entries, budget, recipe, (loss_name, function), references)
        built = found.built
    phases = {"capture": captured - started, "float pass": float_pass}
    report = summarize(model, job, recipe, built, found, references=references, phases=phases, loss=loss_name)
    facts = Facts.of(
        built.model,
        placement=job.placement,
        example=select(job.batches[0], torch.arange(EXAMPLE_ROWS) % rows(job.batches[0])),
        dynamic=dynamic,
        equal_axes=equal_axes(job.batches),
    )
    return QuantizedModel(built.model, facts, report, None if found is None else found.prices)


def _target(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Where to compute."""
    first = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return find_device(device) if device is not None else first


def _captured(model: nn.Module, batch: Batch, found: DynamicAxes, given: DynamicAxes) -> Network:
    """The network, where its inputs are."""
    device = next(leaf.device for leaf in flatten(batch)[0] if isinstance(leaf, Tensor))
    network = capture_with(moved_to(model, device), batch, found, given)
    if not network.layers:
        raise SpecError(
            "the network has no convolution, linear layer or embedding with constant weights: there is nothing to quantize."
        )
    return network


def _in_parts(
    model: nn.Module,
    batches: list[Batch],
    reason: CaptureError,
    override: Mapping[str, str | None],
    first_last: str | None,
    options: Mapping[str, Any],
    notes: Sequence[str],
) -> PartlyQuantized:
    """The network quantized in its largest capturable sub-modules."""
    parsed = Bits.parse(options["bits"] or DEFAULT_BITS)
    ends = ("w8" if parsed.activation is None else "w8a8") if first_last == "auto" else first_last

    def whole(part: nn.Module, inputs: list[Batch], chosen: Mapping[str, str | None]) -> QuantizedModel:
        exact = {glob.escape(name): text for name, text in chosen.items()}
        return quantize(part, inputs, override=exact, first_last=None, **options)

    def on_part(done: int, total: int) -> None:
        options["progress"].section(done / total, (done + 1) / total)

    found = quantize_parts(model, batches, whole, reason, override=override, ends=ends, notes=notes, on_part=on_part)
    warn(found.report.notes[len(notes)], CaptureWarning)
    return found


def _decided(
    network: Network,
    bits: str | Sequence[str] | None,
    plan: Plan | None,
    *,
    override: Mapping[str, str | None] | None,
    first_last: str | None,
    search: bool,
) -> tuple[Choices, dict[str, Bits]]:
    """The choices of every layer; and the bits that are decided: all of them, or under a budget those of tensors."""
    if search:
        assert bits is not None
        return decide_choices(network, bits=bits, override=override, first_last=first_last)
    assert bits is None or isinstance(bits, str)
    entries = decide_bits(network, bits=bits, plan=plan, override=override, first_last=first_last)
    return {name: (entries[name],) for name in network.layers}, entries
