"""The method on one screen: capture, decide the bits, quantize layer by layer, re-estimate statistics, tune biases, report."""

import glob
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from calque.admission import require_inputs, require_original
from calque.budget import Budget
from calque.calibration import prepare
from calque.checkpoint import Checkpoint, FilePath, alone, fingerprint, open_run
from calque.decisions import DEFAULT_BITS, asked_layers, decide_bits, decide_choices
from calque.errors import CaptureError, SpecError
from calque.estimate import estimate
from calque.fields import optional, whole
from calque.graph import Batch, DynamicAxes, Network, Signature, capture
from calque.graph.batching import find_layout, varying_axes
from calque.graph.copies import duplicate
from calque.graph.regions import undisturbed
from calque.graph.signature import flatten, rows, select
from calque.guard import guard
from calque.job import Job, Progress, silent
from calque.losses import LossName, OutputLoss, find_loss
from calque.model import QuantizedModel
from calque.outliers import healthy
from calque.parallel import Choices
from calque.parts import PartlyQuantized, quantize_parts
from calque.recipe import Recipe, find_recipe
from calque.search import check_budget, search
from calque.smoothing import smooth
from calque.spec import SEEDS, Bits, Placement, Plan
from calque.stages import build
from calque.store import parse_bytes
from calque.summary import summarize

log = logging.getLogger(__name__)

MOST_WORKERS = 4096
EXAMPLE_ROWS = 3  # of the inputs that a saved network is captured with again


@undisturbed()
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
    progress: Progress | None = None,
) -> QuantizedModel:
    """A quantized copy of `model`, fitted on `calibration`; the model itself is left untouched.

    Source: Hubara et al. 2021 (ICML); see the recipe for deviations.

    Args:
        model: a float32 network; the README's Limits list the layers that are quantized.
        calibration: unlabelled inputs: a tensor (N, ...), a list or DataLoader of batches; a batch is a tensor, a tuple of
            positional arguments (cut to the parameters that forward requires) or a dict of keyword arguments. Rows that
            alone would decide a range are left out; a CalibrationWarning and the report name them by their numbers.
        bits: "w<bits>a<bits>" with 2 to 8 bits, or "w<bits>" for weights alone. Several of them are the candidates that a
            budget chooses from. Default "w8a8", unless there is a plan.
        budget: what the network may cost; each layer then gets one of the candidates by an integer program over measured
            prices, the ends included.
        plan: bits by layer and tensor name, in place of `bits`.
        override: glob pattern of names -> bits, or None for float.
        recipe: "nearest", "light", "fast" (the default), "accurate", "sequential", "advanced", "paper-2021", a TOML
            file or a Recipe.
        placement: "integer" (all operands of integer kernels) or "inputs" (inputs of weighted layers, as in the paper).
        first_last: bits of the first and last layer; "auto" is "w8a8" ("w8" without activations) at fixed bits and nothing
            special under a budget or a plan, None is nothing special.
        loss: "kl", "mse" or a differentiable function of the float and the quantized outputs; what prices and the tuning of
            biases are judged by. Default: mse (docs/experiments.md), the squared error over the float output's power.
        dynamic: axes besides the batch that may change, as torch.export's dynamic_shapes: {"x": {2: Dim.AUTO}}. Axes
            whose sizes differ between calibration batches are found by themselves.
        run: a folder for finished pieces; the same call with the same folder goes on after a kill.
        seed: of the sampling; the same seed gives the same codes on a CPU with the same number of threads, unless the
            recipe is bounded in minutes (accurate): the report names the steps that reproduce it.
        device: where to compute; the default is where the model is.
        memory: for values between two operators, in RAM; what exceeds it goes to disk.
        workers: processes of one thread each that fit layers independently (parallel AdaQuant), by joblib's backend; the
            codes do not depend on their number. None fits in this process.
        progress: called with (phase, steps done, steps in all).

    Returns:
        An nn.Module with the original's signature, in eval mode, with `report`, `plan` and, under a budget, `prices`. Where the
        network cannot be captured whole, a `PartlyQuantized`: its largest sub-modules that can be are quantized in place, at
        fixed bits and the default loss, and the report says what stays float and why.

    Raises:
        SpecError: bits, plan, override or an option that breaks a rule; a `run` folder of another run.
        InfeasibleBudgetError: a budget that no allocation keeps; the smallest feasible one is named.
        CaptureError: a network of which nothing can be captured, or not the whole where there is a budget, a plan or a `run`.
        CalibrationError: inputs that are empty, not finite or of the wrong form, or that the model itself refuses.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> q = quantize(net, torch.randn(64, 1, 4, 4), bits="w8a8", recipe="nearest")
    >>> q(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 2])
    """
    started = time.perf_counter()
    _check_options(bits, budget, plan, placement, workers, seed)
    require_original(model)
    target = _target(model, device)
    batches = prepare(
        calibration, Signature.of(model), target, find=lambda items: find_layout(_moved(model, target), items)
    )
    axes = {**varying_axes(batches), **(dynamic or {})}
    try:
        network = _captured(model, batches, axes)
    except CaptureError as error:
        require_inputs(model, batches[0])
        if budget is not None or plan is not None or run is not None:
            raise
        options = {"bits": bits, "recipe": recipe, "placement": placement, "loss": None, "seed": seed, "memory": memory}
        return _in_parts(
            model, batches, error, override or {}, first_last,
            {**options, "device": device, "workers": workers, "progress": progress},
        )  # fmt: skip
    choices, entries = _decided(
        network, bits, plan, override=override, first_last=first_last, search=budget is not None
    )
    job = Job(
        network, batches, find_recipe(recipe), placement, seed, parse_bytes(memory),
        workers=workers, progress=progress or silent,
    )  # fmt: skip
    if budget is not None:
        check_budget(job, choices, entries, budget)
    captured = time.perf_counter()
    job, references, extremes = healthy(job)
    float_pass = time.perf_counter() - captured
    if job.recipe.migration:
        smoothed, moved = smooth(job, choices)
        job, extremes = replace(job, network=smoothed), {} if moved else extremes
    asked_tensors = {name: entry for name, entry in entries.items() if name not in network.layers}
    kept = asked_layers(network, plan, override or {})
    guarded = guard(job, choices, asked_tensors, extremes, kept=kept)
    job = replace(job, network=guarded.network, notes=(*job.notes, *guarded.notes))
    choices, entries = guarded.applied(choices, entries)
    loss_name, function = find_loss(loss, references[0], network.out_spec)
    # no budget among these: pieces do not depend on it, so that another one goes on from the same prices
    asked = {"bits": bits, "plan": plan and plan.to_toml(), "override": override, "first_last": first_last}
    job = replace(job, checkpoint=_open(run, job, {**asked, "loss": _named(loss)}))
    log.info("%s", estimate(job, choices, float_pass, search=budget is not None))
    found = None
    with alone(job.checkpoint):
        if budget is not None:
            found = search(job, choices, entries, budget, (loss_name, function), references)
        built = build(job, entries, function, references) if found is None else found.built
    result = built.model
    example = select(job.batches[0], torch.arange(EXAMPLE_ROWS) % rows(job.batches[0]))
    result.facts |= {"placement": placement, "example": example, "dynamic": axes}
    result.prices = None if found is None else found.prices
    phases = {"capture": captured - started, "float pass": float_pass}
    result.report = summarize(model, job, built, found, phases=phases, loss=loss_name)
    return result


def _target(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Where to compute."""
    first = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return _device(device) if device is not None else first


def _captured(model: nn.Module, batches: list[Batch], axes: DynamicAxes) -> Network:
    """The network, where its inputs are."""
    leaves = [leaf for leaf in flatten(batches[0])[0] if isinstance(leaf, Tensor)]
    network = capture(_moved(model, leaves[0].device), batches[0], axes)
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
) -> PartlyQuantized:
    """The network quantized in its largest capturable sub-modules."""
    parsed = Bits.parse(options["bits"] or DEFAULT_BITS)
    automatic = "w8" if parsed.activation is None else "w8a8"
    ends = automatic if first_last == "auto" else first_last

    def whole(part: nn.Module, inputs: list[Batch], chosen: Mapping[str, str | None]) -> QuantizedModel:
        exact = {glob.escape(name): text for name, text in chosen.items()}
        return quantize(part, inputs, override=exact, first_last=None, **options)

    return quantize_parts(model, batches, whole, reason, override=override, ends=ends)


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


def _check_options(
    bits: str | Sequence[str] | None,
    budget: Budget | None,
    plan: Plan | None,
    placement: Placement,
    workers: int | None,
    seed: int,
) -> None:
    if placement not in ("integer", "inputs"):
        raise SpecError(f'placement is "integer" or "inputs". Got {placement!r}.')
    whole(*SEEDS)("seed", seed)
    if budget is not None and not isinstance(budget, Budget):
        raise SpecError(f"budget is a calque.Budget, such as Budget(size=0.13). Got {budget!r}.")
    optional(whole(1, MOST_WORKERS))("workers", workers)
    several = bits is not None and not isinstance(bits, str)
    if budget is not None and plan is not None:
        raise SpecError("budget and plan exclude each other: a plan has the bits of every layer. Drop one of them.")
    if several and budget is None:
        raise SpecError(f"several bits are candidates that a budget chooses from. Got {bits!r} without a budget.")
    if budget is not None and not several:
        raise SpecError(f'a budget chooses from several bits, such as ("w8a8", "w4a4", "w2a4"). Got {bits!r}.')


def _open(run: FilePath | None, job: Job, settings: Mapping[str, object]) -> Checkpoint:
    """Where the run's pieces are kept; its identity is everything that they depend on."""
    if run is None:
        return Checkpoint(None)
    leaves = {
        f"{index}/{position}": leaf
        for index, batch in enumerate(job.batches)
        for position, leaf in enumerate(flatten(batch)[0])
    }
    identity = {name: repr(value) for name, value in settings.items()}
    geometries = [job.network.weighted(name).geometry for name in job.network.layers]
    identity |= {
        "network": f"{job.network.module.code} {geometries}",
        "weights": fingerprint(dict(job.network.module.state_dict())),
        "calibration": fingerprint({name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)})
        + "".join(f" {name} {leaf!r}" for name, leaf in leaves.items() if not isinstance(leaf, Tensor)),
        "recipe": job.recipe.to_toml(),
        "placement": job.placement,
        "seed": str(job.seed),
        "device": str(job.network.weighted(next(iter(job.network.layers))).weight.device),
        "threads": str(torch.get_num_threads() if job.workers is None else f"{torch.get_num_threads()}, workers"),
        "versions": f"calque {version('calque')}, torch {torch.__version__}",
    }
    return open_run(run, identity)


def _named(loss: object) -> object:
    """What stands for a loss in another process, where a function or an object has another address."""
    return getattr(loss, "__qualname__", type(loss).__qualname__) if callable(loss) else loss


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
    return duplicate(model).to(device)
