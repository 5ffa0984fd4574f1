"""AdaQuant's parallel flavour: layers fitted on their float inputs, once per candidate, by any number of workers.

Source: Hubara et al. 2021, section 3 (equation 2): the layers are independent of each other. Tasks carry paths, not tensors, so
that a worker may be another process, or another machine that sees the same folder.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from calque.calibration.batches import real_tokens
from calque.calibration.execution import Execution
from calque.calibration.job import Job
from calque.fitting.adaquant import Draw, Linear
from calque.fitting.embedding import fit_table
from calque.fitting.grids import SAMPLED_VALUES
from calque.fitting.layer import fit_from_piece, fit_to_piece, reads_whole_inputs, solve_each_
from calque.fitting.problem import Fit, Grid, LayerProblem, layer_problem, output_error
from calque.fitting.whole_inputs import whole_inputs
from calque.grid.arithmetic import activation_limits, affine_grid
from calque.grid.bits import Bits
from calque.grid.ranges import TensorSample, WeightRange, activation_range, off_ties, search_range
from calque.network import Geometry, Layer
from calque.network.layers import Activation
from calque.network.tensors import root
from calque.run.checkpoint import PROBLEMS, Checkpoint, Piece
from calque.run.files import temporary_folder
from calque.run.processes import Owner, end_with
from calque.run.threads import one_thread
from calque.run.workers import run_by_workers
from calque.settings import Method, Ranges

Choices = Mapping[str, Sequence[Bits]]
Fits = dict[tuple[str, Bits], Fit]


@dataclass(frozen=True, slots=True)
class Task:
    """One layer on one grid of its input: everything that a worker needs, its tensors by path."""

    results: Checkpoint  # the layer's problem is in the folder PROBLEMS inside
    layer: str
    choices: tuple[tuple[int, str, int], ...]  # weight bits, the result's key, seed
    grid: tuple[float, int, int] | None  # scale, zero point, largest code
    method: Method
    weight_range: WeightRange
    activation: Activation
    geometry: Geometry
    shape: torch.Size  # of the layer's weight
    group: int | None  # of inputs that share a weight scale

    @property
    def problems(self) -> Checkpoint:
        return self.results.within(PROBLEMS)


def fit_choices(job: Job, choices: Choices, method: Method, ranges: Ranges) -> Fits:
    """Each layer at each of its choices, fitted on its float inputs; choices that stay float are left out.

    Args:
        method: of the fit.
        ranges: estimators of the inputs' grids and of the weights' scales.

    Raises:
        CalibrationError: an operator fails on the calibration inputs.
    """
    tables = {name: options for name, options in choices.items() if job.network.is_table(name)}
    choices = {name: options for name, options in choices.items() if name not in tables}
    wanted = [(name, bits) for name, options in choices.items() for bits in options if bits.weight is not None]
    with _folder(job, method) as results:
        missing = {
            name: [b for b in options if b.weight is not None and results.get(_key(name, b)) is None]
            for name, options in choices.items()
        }
        if any(missing.values()):
            _collect(job, missing, method, ranges, results)
        fits: Fits = {}
        for name, bits in wanted:
            piece = results.get(_key(name, bits))
            assert piece is not None
            fits[name, bits] = fit_from_piece(piece, job.network.weighted(name).weight.device)
    for name, options in tables.items():
        weight = job.network.weighted(name).weight
        fits |= {
            (name, bits): fit_table(weight, bits.weight, ranges.weight) for bits in options if bits.weight is not None
        }
    return fits


def _key(name: str, bits: Bits) -> str:
    return f"{name} {bits}"


@contextmanager
def _folder(job: Job, method: Method) -> Iterator[Checkpoint]:
    """Where the results go: the run's folder for this method, or one that lasts as long as the fits."""
    if job.checkpoint.folder is not None:
        yield job.checkpoint.within(f"fits-{zlib.crc32(repr(method).encode()):08x}")
        return
    with temporary_folder() as folder:
        yield Checkpoint(folder)


def _collect(job: Job, missing: Mapping[str, list[Bits]], method: Method, ranges: Ranges, results: Checkpoint) -> None:
    """One float pass that writes each layer's problem; workers fit whenever the problems fill the memory budget."""
    count = job.counter("candidates", len(missing))
    waiting: list[list[Task]] = []
    size = 0
    by_node = {layer.node: layer for layer in job.network.layers.values()}
    with job.store() as store:
        execution = Execution(job.network.module, job.batches, store)
        for node in job.network.nodes():
            if node.op == "output":
                break
            execution.step(node)
            layer = by_node.get(node)
            if layer is not None and missing.get(layer.name):
                waiting.append(_tasks(job, layer, missing[layer.name], method, ranges, execution, results))
                size += _problem_file(waiting[-1]).stat().st_size
                if size > job.memory // 2 or job.workers is None:
                    _run(job, waiting)
                    waiting, size = [], 0
            if layer is not None:
                count(layer.name)
            execution.release(node)
    _run(job, waiting)


def _run(job: Job, waiting: list[list[Task]]) -> None:
    """Fits all tasks, then deletes their problems."""
    tasks = [task for group in waiting for task in group]
    if job.workers is None:
        for task in tasks:
            fit_task(task)
    elif tasks:
        run_by_workers(fit_task_alone, tasks, job.workers)
    for group in waiting:
        _problem_file(group).unlink(missing_ok=True)


def _problem_file(tasks: list[Task]) -> Path:
    """The file that all tasks of a layer read."""
    return tasks[0].problems.path(tasks[0].layer)


def _tasks(
    job: Job,
    layer: Layer,
    options: list[Bits],
    method: Method,
    ranges: Ranges,
    execution: Execution,
    results: Checkpoint,
) -> list[Task]:
    """The layer's tasks, one for each width of its input; its problem is written beside their results."""
    weighted = job.network.weighted(layer.name)
    source = layer.node.args[0]
    assert isinstance(source, fx.Node)
    pairs = map(lambda *both: both, execution.values(source), execution.values(layer.node))
    problem = layer_problem(
        weighted.geometry, weighted.weight, weighted.bias, layer.activate, pairs,
        inputs=job.inputs, generator=job.generator(layer.name), masks=job.masks, sizes=job.sizes,
    )  # fmt: skip
    whole = list(_whole(job, execution, layer)) if reads_whole_inputs(method) else []
    piece = _problem_to_piece(problem, whole)
    results.within(PROBLEMS).put(layer.name, piece)
    sample = TensorSample.of(
        real_tokens(execution.values(source), job.masks),
        count=SAMPLED_VALUES,
        inputs=job.inputs,
        generator=job.generator(f"{layer.name}.input"),
    )
    tasks = []
    for width, group in dict.fromkeys((bits.activation, bits.group) for bits in options):
        alike = [bits for bits in options if (bits.activation, bits.group) == (width, group)]
        keys = {bits.weight: _key(layer.name, bits) for bits in alike}
        choices = tuple(
            (bits, key, job.generator(key).initial_seed()) for bits, key in keys.items() if bits is not None
        )
        grid = _grid(ranges, problem, sample, width, network_input=root(source).op == "placeholder")
        shape = weighted.weight.shape
        tasks.append(
            Task(
                results, layer.name, choices, grid, method, ranges.weight, layer.activate, weighted.geometry, shape, group
            )
        )  # fmt: skip
    return tasks


def _grid(
    ranges: Ranges, problem: LayerProblem, sample: TensorSample, bits: int | None, *, network_input: bool
) -> tuple[float, int, int] | None:
    """Scale, zero point and largest code of a layer's input."""
    if bits is None:
        return None
    _, qmax = activation_limits(bits)
    if ranges.activation == "output":
        error = output_error([problem])
        low, high = search_range(sample.low, sample.high, bits, lambda s, z: error(s, z, qmax), ranges.tolerance)
    else:
        low, high = activation_range(sample, ranges.activation, bits, ranges.tolerance)
    scale, zero_point = affine_grid(low, high, bits)
    if network_input:
        scale = off_ties(sample.values, scale)
    return scale.item(), int(zero_point), qmax


def _whole(job: Job, execution: Execution, layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    source = layer.node.args[0]
    assert isinstance(source, fx.Node)
    for index in range(len(job.batches)):
        yield execution.at(source, index), execution.at(layer.node, index)


def _problem_to_piece(problem: LayerProblem, whole: list[tuple[Tensor, Tensor]]) -> Piece:
    tensors = {
        "patches": problem.patches, "targets": problem.targets, "weight": problem.weight, "bias": problem.bias,
        "fitted": problem.fitted, "held_out": problem.held_out,
    }  # fmt: skip
    for index, (x, y) in enumerate(whole):
        tensors |= {f"input {index}": x, f"output {index}": y}
    return Piece(tensors, {"batches": len(whole), "device": str(problem.weight.device)})


def fit_task(task: Task) -> None:
    """Fits one task and writes its results."""
    piece = task.problems.get(task.layer)
    assert piece is not None
    device = torch.device(piece.facts["device"])
    tensors = {name: value.to(device) for name, value in piece.tensors.items()}
    parts = {name: tensors[name] for name in ("patches", "targets", "weight", "bias", "fitted", "held_out")}
    problem = LayerProblem(**parts, activation=task.activation, group=task.group)
    grid = None
    if task.grid is not None:
        scale, zero_point, qmax = task.grid
        grid = Grid(
            torch.tensor(scale, device=device), torch.tensor(zero_point, dtype=torch.int32, device=device), qmax
        )
    generators = {bits: torch.Generator().manual_seed(seed) for bits, _, seed in task.choices}
    rows = _rows(task, tensors, piece.facts["batches"])
    fits = solve_each_(problem, grid, generators, task.method, weight_range=task.weight_range, rows=rows)
    for bits, key, _ in task.choices:
        task.results.put(key, fit_to_piece(fits[bits]))


def _rows(task: Task, tensors: Mapping[str, Tensor], batches: int) -> tuple[Draw, Linear] | None:
    if not batches:
        return None
    sizes = [tensors[f"input {index}"].shape[0] for index in range(batches)]
    return whole_inputs(
        task.geometry, task.shape, sizes, lambda index: (tensors[f"input {index}"], tensors[f"output {index}"])
    )


def fit_task_alone(task: Task, owner: Owner) -> None:
    """`fit_task` with one thread, so that its sums do not depend on how many workers share the machine.

    Args:
        owner: the process that the tasks are from, and that a worker ends with.
    """
    end_with(owner)
    with one_thread():
        fit_task(task)
