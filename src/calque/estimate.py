"""How long a run will take and how much disk it will use, before it starts."""

from calque.costs import activation_steps, value_shapes
from calque.job import Job
from calque.parallel import Choices

STEP = 4e-3  # seconds of a step of AdaQuant on sampled patches (measured on the networks of benchmarks/)
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
    recipe, layers = job.recipe, len(choices)
    seconds = _fits(job, layers, recipe.steps, float_pass) + SWEEP * float_pass
    seconds += recipe.tuning.steps * recipe.tuning.rows / job.inputs * BACKWARD * float_pass
    if search:
        candidates = sum(len(options) for options in choices.values())
        priced = min(1.0, recipe.priced_inputs / job.inputs)
        seconds = (recipe.finalists + 1) * seconds + SWEEP * float_pass + SUFFIX * candidates * priced * float_pass
        seconds += _fits(job, candidates, recipe.search_steps, float_pass) / (job.workers or 1)
    shapes = value_shapes(job.network, job.batches[0])
    alive = max(fixed for fixed, _ in activation_steps(job.network, {}, job.placement, shapes))
    disk = max(0, 2 * alive * job.inputs - job.memory) + (job.memory // 2 if search else 0)
    minutes = f"{seconds / 60:.0f} minutes" if seconds >= 2 * NOTABLE else f"{seconds:.0f} seconds"
    space = f"up to {disk / 1e9:.1f} GB of disk beside {job.memory / 1e9:.1f} GB of memory"
    return f"about {minutes} for {job.inputs} inputs, {space}"


def _fits(job: Job, count: int, steps: int, float_pass: float) -> float:
    if job.recipe.patches == "sampled":
        return count * steps * STEP
    inputs = min(50, job.inputs)
    return steps * count / max(1, len(job.network.layers)) * WARMTH * inputs / job.inputs * float_pass
