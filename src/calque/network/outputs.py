"""What forward returns as a flat list of tensors and the tree that they came from, whatever it is made of.

pytree knows lists, tuples, named tuples and dicts. Dataclasses and sub-classes of dict, which are leaves to it, are taken apart
here; numbers, strings, None and whatever else is no tensor is part of the tree. `pytree.tree_unflatten` puts all of it together.
"""

import enum
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_COMPUTED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, type, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Constant:
    """Something that is no tensor, in the tree."""

    value: object

    def __eq__(self, other: object) -> bool:  # nan is nan
        return isinstance(other, _Constant) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


@dataclass(frozen=True)
class Record:
    """An object of named parts."""

    kind: type
    names: tuple[str, ...]
    parts: tuple[object, ...]


def flatten_outputs(result: object) -> tuple[list[Any], pytree.TreeSpec]:
    """The tensors (and sizes that depend on the inputs) of what a network returns, in order, and the tree that they came from.

    Raises:
        TypeError: something in it that can neither be taken apart nor kept as it is.

    >>> tensors, spec = flatten_outputs({"y": torch.ones(2), "version": 3})
    >>> pytree.tree_unflatten(tensors, spec)
    {'y': tensor([1., 1.]), 'version': 3}
    """
    return pytree.tree_flatten(_opened(result))


@contextmanager
def flat_outputs(model: nn.Module) -> Iterator[list[pytree.TreeSpec]]:
    """Makes the model return its flat tensors alone; the list has the tree of the last call."""
    forward, own = model.forward, model.__dict__.get("forward")
    found: list[pytree.TreeSpec] = []

    @functools.wraps(forward)
    def flat(*args: object, **kwargs: object) -> tuple[Any, ...]:
        tensors, spec = flatten_outputs(forward(*args, **kwargs))
        found[:] = [spec]
        return tuple(tensors)

    model.__dict__["forward"] = flat
    try:
        yield found
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _opened(value: object) -> Any:
    return pytree.tree_map(_opened_leaf, value)


def _opened_leaf(leaf: object) -> object:
    if isinstance(leaf, _COMPUTED):
        return leaf
    if isinstance(leaf, _CONSTANTS):
        return _Constant(leaf)
    if is_dataclass(leaf):
        parts = {field.name: getattr(leaf, field.name) for field in fields(leaf) if hasattr(leaf, field.name)}
    elif isinstance(leaf, dict):
        parts = leaf
    else:
        raise TypeError(
            "forward must return tensors, numbers, strings, None, and lists, tuples, dicts and dataclasses of them. Got "
            f"{type(leaf).__name__}."
        )
    return Record(type(leaf), tuple(parts), tuple(_opened(part) for part in parts.values()))


def _closed(parts: Any, context: Any) -> object:
    kind: Any = context[0]
    values = dict(zip(context[1], parts, strict=True))
    has_fields = is_dataclass(kind)
    if issubclass(kind, dict):
        built: object = kind(**values) if has_fields else kind(values)
        return built
    result: object = kind.__new__(kind)  # its __init__ may ask for other arguments
    for name, value in values.items():
        object.__setattr__(result, name, value)  # it may be frozen
    return result


pytree.register_pytree_node(
    _Constant,
    lambda constant: ([], constant),
    lambda _, constant: constant.value,
    serialized_type_name="calque.constant",
)
pytree.register_pytree_node(
    Record,
    lambda record: (list(record.parts), (record.kind, record.names)),
    _closed,
    serialized_type_name="calque.record",
)
