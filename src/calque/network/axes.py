"""The option `dynamic`: which axes besides the batch may change, checked against the inputs before anything is captured."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from calque.errors import CaptureError, SpecError
from calque.network.capture import capture
from calque.network.network import Network
from calque.network.signature import Batch, flatten, have_rows, leaf_names
from calque.network.trace import DynamicAxes
from calque.run.fields import shown

_FREE = (type(Dim.AUTO), Dim)


def check_dynamic(dynamic: object, batch: Batch) -> dict[str, dict[int, Any]]:
    """The option as {input: {axis: Dim}}.

    Args:
        batch: inputs by name, whose axes these are.

    Raises:
        SpecError: a name that is no input, an axis that it does not have, the batch axis, or a value that is no free Dim.
    """
    if dynamic is None:
        return {}
    if not isinstance(dynamic, Mapping):
        raise SpecError(f'dynamic maps inputs to their axes, as in {{"x": {{2: Dim.AUTO}}}}. Got {shown(dynamic)}.')
    return {name: _checked(name, axes, batch) for name, axes in dynamic.items()}


def merged(found: Mapping[str, Mapping[int, Any]], given: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
    """The free axes of both; what is `given` for an axis counts."""
    return {name: {**found.get(name, {}), **given.get(name, {})} for name in (*found, *(given.keys() - found.keys()))}


def capture_with(model: nn.Module, batch: Batch, found: DynamicAxes, given: DynamicAxes) -> Network:
    """The network, captured with the free axes that were found in its inputs and those that are given.

    Raises:
        SpecError: a given axis does not fit the network, which fixes it or other sizes than the Dim allows.
        CaptureError: as of `capture`, whatever is given.
    """
    try:
        network = capture(model, batch, merged(found, given))
    except CaptureError as error:
        if given:
            _blame(model, batch, found, error)
        raise
    for name, leaf, form in zip(leaf_names(batch), flatten(batch)[0], network.inputs, strict=True):
        for axis in given.get(_argument(name, batch), ()):
            if form is not None and axis not in form.dynamic:
                raise SpecError(
                    f"dynamic does not fit the network: it fixes axis {axis} of {name} at {leaf.shape[axis]}, as a linear layer "
                    "behind all pixels does. Leave that axis out."
                )
    return network


def _blame(model: nn.Module, batch: Batch, found: DynamicAxes, error: CaptureError) -> None:
    """Raises SpecError where what was given is why the network was not captured."""
    try:
        capture(model, batch, found)
    except CaptureError:
        return
    lines = [line.strip().removeprefix("- ") for line in str(error.__cause__).splitlines() if line.strip()]
    reason = lines[1] if len(lines) > 1 and lines[0].startswith("Constraints violated") else lines[0]
    raise SpecError(
        f"dynamic does not fit the network, which is captured without it: {reason.partition('. ')[0].rstrip('.')}. Leave that "
        "axis out, or give it Dim.AUTO."
    ) from error


def _argument(leaf: str, batch: Batch) -> str:
    """The argument of forward that a leaf belongs to."""
    return next(name for name in batch if leaf == name or leaf.startswith((f"{name}[", f"{name}.")))


def _checked(name: object, axes: object, batch: Batch) -> dict[int, Any]:
    if not isinstance(name, str) or name not in batch:
        raise SpecError(f"dynamic names inputs of forward: {', '.join(batch)}. Got {shown(name)}.")
    tensors = [leaf for leaf in pytree.tree_leaves(batch[name]) if isinstance(leaf, Tensor)]
    if not tensors:
        raise SpecError(f"dynamic names inputs that are tensors. {name} is {batch[name]!r}. Leave it out.")
    if not isinstance(axes, Mapping):
        raise SpecError(f"dynamic[{shown(name)}] maps axes to a Dim, as in {{2: Dim.AUTO}}. Got {shown(axes)}.")
    known = zip(leaf_names(batch), have_rows(batch), strict=True)
    batched = any(rows for leaf, rows in known if _argument(leaf, batch) == name)
    for axis, free in axes.items():
        _check_axis(name, axis, tensors, batched=batched)
        if not isinstance(free, _FREE) or free == Dim.STATIC:
            raise SpecError(
                f"dynamic[{shown(name)}][{axis}] must be Dim.AUTO, Dim.DYNAMIC or a torch.export.Dim. Got {shown(free)}; "
                "leave out axes that are fixed."
            )
    return dict(axes)


def _check_axis(name: str, axis: object, tensors: list[Tensor], *, batched: bool) -> None:
    least = min(tensor.dim() for tensor in tensors)
    if type(axis) is not int or not 0 <= axis < least:
        raise SpecError(
            f"dynamic[{shown(name)}] names axes by their number, from 0 to {least - 1} of {name} with the shape "
            f"{tuple(tensors[0].shape)}. Got {shown(axis)}."
        )
    if axis == 0 and batched:
        raise SpecError(f"axis 0 of {name} is its batch, which is free anyway. Leave it out of dynamic.")
