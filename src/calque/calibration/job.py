"""What every stage of a run reads: the network, its inputs and where finished pieces are kept."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from calque.calibration.batches import token_masks
from calque.grid.bits import Placement
from calque.network import Batch, Network
from calque.network.signature import flatten, rows, select, values
from calque.run.checkpoint import Checkpoint
from calque.run.progress import Progress, silent
from calque.run.spill import Store

EXAMPLE_ROWS = 3  # by which networks are compared, and with which a saved one is captured again
RESERVE = 700 * 10**6  # bytes: an operator's inputs and outputs, a sampled problem and the temporaries of its fit


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        network: captured, float.
        batches: the calibration inputs.
        memory: bytes for values between two operators.
        checkpoint: keeps finished pieces.
        workers: processes of one thread each that fit layers; None is the caller's own process.
        notes: what the report says of the calibration inputs and of grids.
    """

    network: Network
    batches: list[Batch]
    placement: Placement = "integer"
    seed: int = 0
    memory: int = 2 * 10**9
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None))
    workers: int | None = None
    progress: Progress = silent
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> int:
        """The size of the calibration set."""
        return sum(rows(batch) for batch in self.batches)

    @property
    def largest(self) -> Batch:
        """The batch with the most values per input: what costs of one input are counted for."""
        return max(self.batches, key=lambda batch: values(batch) / rows(batch))

    @cached_property
    def sizes(self) -> list[int]:
        """The inputs of each batch."""
        return [rows(batch) for batch in self.batches]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Which tokens of each batch are no padding."""
        return token_masks(self.batches)

    @property
    def example(self) -> list[Any]:
        """The flat inputs of a few rows, by which a rewritten network is compared with what it was."""
        batch = self.batches[0]
        return flatten(select(batch, torch.arange(EXAMPLE_ROWS) % rows(batch)))[0]

    def generator(self, name: str) -> torch.Generator:
        """Randomness for the part of the run that is called `name`, whatever ran before it."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))

    def store(self) -> Store:
        """For values between two operators; RESERVE of it, or three quarters, is left for what runs and is solved."""
        return Store(max(self.memory // 4, self.memory - RESERVE))

    def outputs_store(self) -> Store:
        """For the float network's outputs, which last as long as the run."""
        return Store(self.memory // 16)

    def counter(self, phase: str, total: int) -> Callable[[str], None]:
        """A callback that counts finished steps of a phase."""
        done = 0

        def count(_: str) -> None:
            nonlocal done
            done += 1
            self.progress(phase, done, total)

        return count
