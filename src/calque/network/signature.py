"""How a call of the original network becomes a flat list of inputs, a flat list of outputs its result, and where its rows are."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calque.errors import CalibrationError, CaptureError
from calque.run.fields import shown

Batch = dict[str, object]  # argument name -> value, in the order of forward's parameters
Axis = tuple[str, int]  # of an input: its name, as in "boxes[0]", and which of its axes
MASK = "attention_mask"  # the argument by which encoders tell tokens from padding

_KINDS = inspect.Parameter


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch are.

    Attributes:
        whole: names of the tensors without a batch axis: every row gets all of them. The others have it at axis 0.
        apart: whether the network treats each row by itself, so that rows may be drawn and executed apart from each other.
        nowhere: whether no tensor has rows.
    """

    whole: frozenset[str] = frozenset()
    apart: bool = True
    nowhere: bool = False

    def __post_init__(self) -> None:
        if self.nowhere and self.apart:
            raise ValueError("where nothing has rows, none can be apart. Got nowhere and apart.")


class _LaidOut(dict[str, object]):
    """A batch that knows its layout."""

    def __init__(self, batch: Mapping[str, object], layout: Layout):
        super().__init__(batch)
        self.layout = layout


@dataclass(frozen=True)
class Signature:
    """The parameters of a network's forward, by name; and where the rows of its inputs are, once that is known."""

    positional: tuple[str, ...]
    required: tuple[str, ...]
    keyword_only: tuple[str, ...]
    layout: Layout | None = None

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

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters."""
        return (*self.positional, *self.keyword_only)

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
            if name in given or name not in self.names:
                problem = "is given twice" if name in given else "is not a parameter of forward"
                raise CalibrationError(f"argument {shown(name)} {problem}. forward takes: {', '.join(self.names)}.")
            given[name] = value
        missing = [name for name in self.required if name not in given]
        if missing:
            raise CalibrationError(
                f"forward needs the argument(s) {', '.join(missing)}. Got: {', '.join(given) or 'none'}."
            )
        return {name: given[name] for name in self.names if name in given}

    def batch(self, item: object) -> Batch:
        """A calibration batch by name: a tensor, a tuple (cut to the required parameters) or a dict (cut to the parameters)."""
        if isinstance(item, Mapping):
            missing = [name for name in self.required if name not in item]
            if missing:
                raise CalibrationError(
                    f"calibration: forward needs the argument(s) {', '.join(missing)}. "
                    f"Got: {', '.join(map(str, item)) or 'nothing'}."
                )
            return self.bind((), {name: value for name, value in item.items() if name in self.names})
        if isinstance(item, (tuple, list)):
            needed = [name for name in self.required if name in self.positional]
            return self.bind(tuple(item)[: max(len(needed), 1)], {})
        if isinstance(item, Tensor):
            return self.bind((item,), {})
        raise CalibrationError(
            f"a calibration batch is a tensor, a tuple of positional arguments or a dict. Got {type(item).__name__}."
        )

    def left_out(self, item: object) -> list[str]:
        """A sentence on what `batch` cuts off an item, where a parameter of forward might have been meant."""
        if isinstance(item, Mapping):
            extra = ", ".join(str(name) for name in item if name not in self.names)
            return [f"left out of the batches: {extra}. forward takes: {', '.join(self.names)}."] if extra else []
        if not isinstance(item, (tuple, list)):
            return []
        kept = max(sum(name in self.required for name in self.positional), 1)
        optional = self.positional[kept : len(item)]
        if not optional:
            return []
        return [
            f"batches of {len(item)} items were cut to the required {kept}; {', '.join(optional)} kept the default. A dict of "
            "keyword arguments gives optional ones, too."
        ]


def flatten(batch: Mapping[str, object]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a batch in order, and the tree that they came from."""
    return pytree.tree_flatten(dict(batch))


def leaf_names(batch: Mapping[str, object]) -> list[str]:
    """The name of each leaf: the argument's, or that of its place in the argument, as in "boxes[0]"."""
    paths, _ = pytree.tree_flatten_with_path(dict(batch))
    return [f"{path[0].key}{pytree.keystr(path[1:])}" for path, _ in paths]  # type: ignore[attr-defined]


def laid_out(batch: Mapping[str, object], layout: Layout | None) -> Batch:
    """The batch with this layout; None leaves it to guess: all tensors as long as the first one have the batch axis."""
    return dict(batch) if layout is None else _LaidOut(batch, layout)


def layout_of(batch: Mapping[str, object]) -> Layout | None:
    """The layout that the batch was given."""
    return batch.layout if isinstance(batch, _LaidOut) else None


def have_rows(batch: Mapping[str, object]) -> list[bool]:
    """Which leaves have the batch axis."""
    leaves, layout = flatten(batch)[0], layout_of(batch)
    if layout is not None:
        named = zip(leaf_names(batch), leaves, strict=True)
        return [isinstance(leaf, Tensor) and leaf.dim() > 0 and name not in layout.whole for name, leaf in named]
    count = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
    return [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count for leaf in leaves]


def length(batch: Mapping[str, object]) -> int:
    """The length of the batch axis; 1 where no tensor has one.

    Raises:
        CalibrationError: no tensor could have one, and the batch was given no layout.
    """
    for leaf, batched in zip(flatten(batch)[0], have_rows(batch), strict=True):
        if batched:
            return int(leaf.shape[0])
    if layout_of(batch) is None:
        raise CalibrationError("a calibration batch needs at least one tensor with a batch axis. Got none.")
    return 1


def rows(batch: Mapping[str, object]) -> int:
    """The number of rows that may be drawn apart from each other; 1, the batch itself, where none may."""
    layout = layout_of(batch)
    return length(batch) if layout is None or layout.apart else 1


def values(batch: Batch) -> int:
    """The number of values in all tensors of the batch."""
    return sum(leaf.numel() for leaf in flatten(batch)[0] if isinstance(leaf, Tensor))


def cut(batch: Mapping[str, object], index: Tensor | slice) -> Batch:
    """The entries `index` of the batch axis, whether or not rows depend on each other; other leaves as they are."""
    leaves, spec = flatten(batch)
    picked = [leaf[index] if batched else leaf for leaf, batched in zip(leaves, have_rows(batch), strict=True)]
    tree: Batch = pytree.tree_unflatten(picked, spec)
    return laid_out(tree, layout_of(batch))


def select(batch: Mapping[str, object], index: Tensor) -> Batch:
    """The rows `index`, of `rows(batch)`; other leaves as they are."""
    layout = layout_of(batch)
    return cut(batch, index) if layout is None or layout.apart else laid_out(batch, layout)


def split(batch: Mapping[str, object], size: int) -> list[Batch]:
    """The batch in pieces of at most `size` rows; views of it, no copies."""
    layout = layout_of(batch)
    if layout is not None and not layout.apart:
        return [laid_out(batch, layout)]
    return [cut(batch, slice(start, start + size)) for start in range(0, rows(batch), size)]
