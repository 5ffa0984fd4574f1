"""How a call of the original network becomes a flat list of inputs, and a flat list of outputs its result."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calque.errors import CalibrationError, CaptureError

Batch = dict[str, object]  # argument name -> value, in the order of forward's parameters
MASK = "attention_mask"  # the argument by which encoders tell tokens from padding

_KINDS = inspect.Parameter


@dataclass(frozen=True)
class Signature:
    """The parameters of a network's forward, by name."""

    positional: tuple[str, ...]
    required: tuple[str, ...]
    keyword_only: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Signature":
        """The signature of `model.forward`.

        Raises:
            CaptureError: a forward with *args or positional-only parameters; its arguments have no names.
        """
        positional, required, keyword_only = [], [], []
        for parameter in inspect.signature(model.forward).parameters.values():
            if parameter.kind in (_KINDS.POSITIONAL_ONLY, _KINDS.VAR_POSITIONAL):
                raise CaptureError(
                    f"forward's arguments must have names. Its parameter {parameter.name} is positional only; wrap the "
                    "network in a module whose forward names its inputs."
                )
            if parameter.kind is _KINDS.POSITIONAL_OR_KEYWORD:
                positional.append(parameter.name)
                if parameter.default is _KINDS.empty:
                    required.append(parameter.name)
            elif parameter.kind is _KINDS.KEYWORD_ONLY:
                keyword_only.append(parameter.name)
                if parameter.default is _KINDS.empty:
                    required.append(parameter.name)
        return cls(tuple(positional), tuple(required), tuple(keyword_only))

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Batch:
        """The arguments of a call by name, in the order of the parameters.

        Raises:
            CalibrationError: an argument that forward does not have, has twice, or lacks.
        """
        if len(args) > len(self.positional):
            raise CalibrationError(
                f"forward takes at most {len(self.positional)} positional arguments "
                f"({', '.join(self.positional)}). Got {len(args)}."
            )
        given = dict(zip(self.positional, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in (*self.positional, *self.keyword_only):
                problem = "is given twice" if name in given else "is not a parameter of forward"
                known = ", ".join((*self.positional, *self.keyword_only))
                raise CalibrationError(f"argument {name!r} {problem}. forward takes: {known}.")
            given[name] = value
        missing = [name for name in self.required if name not in given]
        if missing:
            raise CalibrationError(f"forward needs the argument(s) {', '.join(missing)}. Got: {', '.join(given)}.")
        return {name: given[name] for name in (*self.positional, *self.keyword_only) if name in given}

    def batch(self, item: object) -> Batch:
        """A calibration batch by name: a tensor, a tuple (cut to the required parameters) or a dict of keywords."""
        if isinstance(item, Mapping):
            return self.bind((), item)
        if isinstance(item, (tuple, list)):
            needed = [name for name in self.required if name in self.positional]
            return self.bind(tuple(item)[: max(len(needed), 1)], {})
        if isinstance(item, Tensor):
            return self.bind((item,), {})
        raise CalibrationError(
            f"a calibration batch is a tensor, a tuple of positional arguments or a dict. Got {type(item).__name__}."
        )


def flatten(batch: Mapping[str, object]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a batch in order, and the tree that they came from."""
    return pytree.tree_flatten(dict(batch))


def rows(batch: Mapping[str, object]) -> int:
    """The number of rows of a batch: the length of the first tensor's axis 0."""
    for leaf in flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise CalibrationError("a calibration batch needs at least one tensor with a batch axis. Got none.")


def values(batch: Batch) -> int:
    """The number of values in all tensors of the batch."""
    return sum(leaf.numel() for leaf in flatten(batch)[0] if isinstance(leaf, Tensor))


def select(batch: Mapping[str, object], index: Tensor) -> Batch:
    """The rows `index` of every tensor that has the batch axis; other leaves as they are."""
    count = rows(batch)

    def pick(leaf: object) -> object:
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count
        return leaf[index] if batched and isinstance(leaf, Tensor) else leaf

    return {name: pytree.tree_map(pick, value) for name, value in batch.items()}


def split(batch: Mapping[str, object], size: int) -> list[Batch]:
    """The batch in pieces of at most `size` rows; views of it, no copies."""
    count = rows(batch)

    def piece(start: int) -> Batch:
        def cut(leaf: object) -> object:
            batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count
            return leaf[start : start + size] if batched and isinstance(leaf, Tensor) else leaf

        return {name: pytree.tree_map(cut, value) for name, value in batch.items()}

    return [piece(start) for start in range(0, count, size)]
