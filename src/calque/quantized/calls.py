"""How a captured network may be called: as it was at calibration, but for the values of tensors and the axes that are free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from calque.network.compat import children
from calque.network.signature import Batch, Signature, flatten, leaf_names


@dataclass(frozen=True)
class CallForm:
    """The form of a call at calibration.

    Attributes:
        signature: of forward.
        tree: of the arguments that were given.
        tensors: of each leaf, whether it was a tensor.
        constants: of each leaf that was none, its value.
        example: inputs by argument name; empty where none are known.
        dynamic: axes besides the batch that are free, by argument name.
    """

    signature: Signature
    tree: pytree.TreeSpec
    tensors: Sequence[bool]
    constants: Sequence[object]
    example: Mapping[str, object]
    dynamic: Mapping[str, object]

    def leaves(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[Any]:
        """The flat inputs of a call.

        Raises:
            CalibrationError: an argument that forward does not have, has twice, or lacks.
            TypeError: an argument that was not given at calibration, is missing, or was something else: no tensor, another
                constant, whole numbers in place of real ones.
            ValueError: a tensor of another rank, or of another size along an axis that is not free.
        """
        batch = self.signature.bind(args, kwargs)
        leaves, tree = flatten(batch)
        if tree != self.tree:
            raise self._another_form(batch)
        for name, leaf, is_tensor, constant in zip(
            leaf_names(batch), leaves, self.tensors, self.constants, strict=True
        ):
            if is_tensor:
                _require_tensor(name, leaf)
            elif isinstance(leaf, Tensor) or not _same(leaf, constant):
                raise TypeError(
                    f"{name} was {constant!r} at calibration, which is a constant of the quantized network. Got {_said(leaf)}; "
                    "quantize with that value in its place."
                )
        self._check_sizes(batch)
        return leaves

    def _another_form(self, batch: Batch) -> TypeError:
        """What is too much, missing or built otherwise, and what to do."""
        known = dict(zip(self.tree.context, children(self.tree), strict=True))
        for name, value in batch.items():
            if name not in known:
                return TypeError(
                    f"{name} had forward's default at calibration, which is a constant of the quantized network. Got "
                    f"{_said(value)}; leave it out, or quantize with it in every calibration batch."
                )
            if children(flatten({name: value})[1])[0] != known[name]:
                before = _form(pytree.tree_unflatten(["..."] * known[name].num_leaves, known[name]))
                return TypeError(f"{name} was {before} at calibration. Got {_said(value)}; pass it in the same form.")
        missing = [name for name in known if name not in batch]
        value = self.example.get(missing[0])
        example = "" if value is None or isinstance(value, Tensor) else f" ({value!r})"
        return TypeError(f"{missing[0]} was given at calibration{example}. Pass it in every call.")

    def _check_sizes(self, batch: Batch) -> None:
        """Raises where a tensor is not of the example's rank, kind of numbers, or size along an axis that is not free."""
        layout = self.signature.layout
        whole = layout.whole if layout is not None else ()
        for name, value in batch.items():
            known, axes = self.example.get(name), self.dynamic.get(name, {})
            if not isinstance(value, Tensor) or not isinstance(known, Tensor) or not isinstance(axes, Mapping):
                continue
            if value.is_floating_point() != known.is_floating_point():
                raise TypeError(
                    f"{name} was captured as {known.dtype}. Got {value.dtype}; prepare it as in calibration."
                )
            if value.dim() != known.dim():
                raise ValueError(f"{name} was captured with {known.dim()} axes. Got {value.dim()}.")
            for axis in range(0 if name in whole else 1, value.dim()):
                if axis not in axes and value.shape[axis] != known.shape[axis]:
                    raise ValueError(
                        f"axis {axis} of {name} was captured as {known.shape[axis]}. Got {value.shape[axis]}. Calibrate with "
                        f'several sizes, or quantize with dynamic={{"{name}": {{{axis}: Dim.AUTO}}}}.'
                    )


def _require_tensor(name: str, leaf: object) -> None:
    if not isinstance(leaf, Tensor):
        how = f"; pass torch.from_numpy({name})" if isinstance(leaf, np.ndarray) else ""
        raise TypeError(f"{name} was a tensor at calibration. Got {_said(leaf)}{how}.")


def _same(leaf: object, constant: object) -> bool:
    try:
        return bool(leaf == constant)
    except (ValueError, RuntimeError):  # arrays
        return False


def _said(value: object) -> str:
    """A short value as it is, else its form."""
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else _form(value)


def _form(value: object) -> str:
    if isinstance(value, (Tensor, str)):
        return "a tensor"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value))}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__module__}.{type(value).__name__}"
