"""How long a run will take and how much disk it will use, before it starts."""

from collections.abc import Mapping

from calque.costs import activation_steps, value_shapes
from calque.graph import WeightedLayer
from calque.job import Job
from calque.parallel import Choices
from calque.solvers.adaquant import rows_per_step
from calque.solvers.closed_form import FACTORS, RIDGES
from calque.solvers.problem import POSITIONS, per_input

STEP = 7e-4  # seconds of a step of AdaQuant on sampled patches, whatever the layer (measured on the networks of benchmarks/)
RATE = 2e10  # operations a second of such a step, forward and backward
COLUMN = 1e-4  # seconds of one column of a sweep of GPTQ or coordinate descent
PRODUCTS = 4e10  # operations a second of matrix products
SWEEP = 12  # float passes that one sweep with its statistics takes besides its fits
BACKWARD = 8  # float passes of one step that goes through the quantized network and back, per input
SUFFIX = 1.2  # float passes of pricing one choice: half of a network, quantized
WARMTH = 3.0  # fits by whole inputs, forward and backward, in float passes of the layer
NOTABLE = 60  # seconds


def estimate(job: Job, choices: Choices, float_pass: float, *, search: bool) -> str:
    """A sentence with the time and disk that the run will need, within a factor of about two.

    Args:
        float_pass: seconds that the float network took on the calibration set.
    """
    recipe = job.recipe
    seconds = _fits(job, dict.fromkeys(choices, 1), recipe.steps, float_pass) + SWEEP * float_pass
    if search:
        counts = {name: len(options) for name, options in choices.items()}
        candidates = sum(counts.values())
        priced = min(1.0, recipe.priced_inputs / job.inputs)
        seconds = (recipe.finalists + 1) * seconds + SWEEP * float_pass + SUFFIX * candidates * priced * float_pass
        seconds += _fits(job, counts, recipe.search_steps, float_pass) / (job.workers or 1)
    stepped = recipe.tuning.steps * recipe.tuning.rows + recipe.distillation.steps * recipe.distillation.rows
    seconds += stepped / job.inputs * BACKWARD * float_pass
    if not recipe.distillation.steps:
        seconds += 60 * recipe.distillation.minutes
    shapes = value_shapes(job.network, job.batches[0])
    alive = max(fixed for fixed, _ in activation_steps(job.network, {}, job.placement, shapes))
    disk = max(0, 2 * alive * job.inputs - job.memory)
    if search:
        problems = [_problem_bytes(job, name) for name in choices]
        disk += max(problems) if job.workers is None else min(sum(problems), job.memory // 2 + max(problems))
    minutes = f"{seconds / 60:.0f} minutes" if seconds >= 2 * NOTABLE else f"{seconds:.0f} seconds"
    space = f"up to {disk / 1e9:.1f} GB of disk beside {job.memory / 1e9:.1f} GB of memory"
    known = ", less what is finished" if job.checkpoint.has_pieces() else ""
    return f"about {minutes} for {job.inputs} inputs{known}, {space}"


def _fits(job: Job, counts: Mapping[str, int], steps: int, float_pass: float) -> float:
    """Seconds of fitting each layer so many times."""
    if job.recipe.patches == "all":
        share = sum(counts.values()) / max(1, len(job.network.layers)) * min(50, job.inputs) / job.inputs
        return steps * share * WARMTH * float_pass
    seconds = 0.0
    for name, count in counts.items():
        layer = job.network.weighted(name)
        if job.network.is_table(name):
            continue
        if job.recipe.solver == "closed_form":
            seconds += count * _closed_form(job, layer, steps)
            continue
        width = layer.geometry.groups * layer.geometry.grouped(layer.weight).shape[-1]
        seconds += count * steps * (STEP + 6 * rows_per_step(width) * layer.weight.numel() / RATE)
    return seconds


def _closed_form(job: Job, layer: WeightedLayer, rounds: int) -> float:
    """Seconds of one fit in closed form: moments, factorisations, and sweeps over the columns."""
    groups, outputs, inputs = layer.geometry.grouped(layer.weight).shape
    rows = job.inputs * per_input(POSITIONS, groups * (inputs + outputs), job.inputs)
    sweeps = len(RIDGES) + len(FACTORS) + rounds + 1
    products = rows * (inputs + outputs) + sweeps * inputs * outputs + len(RIDGES) * inputs * inputs
    return sweeps * inputs * COLUMN + 2 * groups * inputs * products / PRODUCTS


def _problem_bytes(job: Job, name: str) -> int:
    """Bytes of a layer's sampled problem at most."""
    layer = job.network.weighted(name)
    width = layer.geometry.groups * layer.geometry.grouped(layer.weight).shape[-1] + layer.weight.shape[0]
    return 4 * job.inputs * width * per_input(POSITIONS, width, job.inputs)
