"""The folder of a run: what its pieces depend on, and the result of a finished one, which the same call returns again."""

import logging
import zlib
from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

from calque.allocation.budget import Budget
from calque.calibration.job import Job
from calque.errors import LoadError, SpecError
from calque.network.signature import flatten
from calque.quantized.model import QuantizedModel
from calque.quantized.prices import Prices
from calque.recipe import Recipe
from calque.run.checkpoint import Checkpoint, Piece, fingerprint, open_run
from calque.run.files import FilePath
from calque.shipping.saved import save
from calque.shipping.saved.quantized import restored

log = logging.getLogger(__name__)


def open_pieces(run: FilePath | None, job: Job, recipe: Recipe, settings: Mapping[str, object]) -> Checkpoint:
    """Where the run's pieces are kept; its identity is everything that they depend on.

    Args:
        job: as it was asked for, before anything is decided.

    Raises:
        SpecError, OSError: see `open_run`.
    """
    if run is None:
        return Checkpoint(None)
    leaves = {
        f"{index}/{position}": leaf
        for index, batch in enumerate(job.batches)
        for position, leaf in enumerate(flatten(batch)[0])
    }
    identity = {name: repr(_named(value)) for name, value in settings.items()}
    geometries = [job.network.weighted(name).geometry for name in job.network.layers]
    identity |= {
        "network": f"{job.network.module.code} {geometries}",
        "weights": fingerprint(dict(job.network.module.state_dict())),
        "calibration": fingerprint({name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)})
        + "".join(f" {name} {leaf!r}" for name, leaf in leaves.items() if not isinstance(leaf, Tensor)),
        "recipe": recipe.to_toml(),
        "placement": job.placement,
        "seed": str(job.seed),
        "device": str(job.network.weighted(next(iter(job.network.layers))).weight.device),
        "threads": str(torch.get_num_threads() if job.workers is None else f"{torch.get_num_threads()}, workers"),
        "versions": f"calque {version('calque')}, torch {torch.__version__}",
    }
    return open_run(run, identity)


def _named(value: object) -> object:
    """What stands for a loss in another process, where a function or an object has another address."""
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def keep_result(checkpoint: Checkpoint, budget: Budget | None, result: QuantizedModel) -> None:
    """Keeps the result of a finished run among its pieces, one for each budget; a network whose inputs no file can describe
    is not kept, and assembled again from its pieces.
    """
    if checkpoint.folder is None:
        return
    if result.prices is not None:
        checkpoint.put(f"prices of {_key(budget)}", Piece({}, {"prices": result.prices.to_json()}))
    try:
        save(result, checkpoint.path(_key(budget)))  # last: it says that all is there
    except SpecError as error:
        log.info("the result is not kept: %s", error)


def kept_result(checkpoint: Checkpoint, budget: Budget | None, model: nn.Module) -> QuantizedModel | None:
    """The result that `keep_result` kept, on the device of `model`; None where the run is not finished, or a file is damaged."""
    if checkpoint.folder is None or not checkpoint.path(_key(budget)).is_file():
        return None
    prices = checkpoint.get(f"prices of {_key(budget)}")
    if budget is not None and prices is None:
        return None
    try:
        known = None if prices is None else Prices.from_json(prices.facts["prices"])
        return restored(checkpoint.path(_key(budget)), model, known)
    except (LoadError, SpecError) as error:
        log.info("the result is made again: %s", error)
        return None


def _key(budget: Budget | None) -> str:
    """The result's name among the pieces; these do not depend on the budget."""
    return "result" if budget is None else f"result {zlib.crc32(repr(budget.to_dict()).encode()):08x}"
