"""Weights from a file, into a network: a state dict, or the one inside a training checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from calque.calibration.samples import unusual
from calque.cli.inputs import InputError, shortened
from calque.cli.readers import read_pickled, read_safetensors
from calque.run.fields import shown

# What wrappers put in front of every name: those for several devices, and torch.compile.
WRAPPERS = ("module.", "_orig_mod.")

State = Mapping[str, Tensor]


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Puts the state dict in a safetensors or .pt file into `model`, in place.

    Of a checkpoint the entry that holds the state dict is taken; what wrappers put in front of all names is left out.

    Returns:
        A sentence on each of these.

    Raises:
        InputError: no state dict, several that fit, or one of another network.
    """
    expected = model.state_dict()
    found: object = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    state, notes = _chosen(path, found, expected)
    state, prefix = _unwrapped(state, expected)
    if prefix:
        notes.append(f'"{prefix}" in front of all names in {path} is left out.')
    kinds = [f"{key} is {kind}" for key in expected if key in state and (kind := _unfit(state[key], expected[key]))]
    shapes = [
        f"{key} {list(state[key].shape)} for {list(expected[key].shape)}"
        for key in expected
        if key in state and not kinds and state[key].shape != expected[key].shape
    ]
    problems = [
        f"{what}: {shortened(names)}"
        for what, names in (
            ("missing", [key for key in expected if key not in state]),
            ("unknown", [key for key in state if key not in expected]),
            ("of another kind", kinds),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise InputError(f"the weights in {path} do not fit the network. {'; '.join(problems)}.")
    model.load_state_dict(state)
    return notes


def _unfit(tensor: Tensor, expected: Tensor) -> str:
    """Why a tensor cannot take the place of another one, whatever its shape; "" where it can."""
    problem = unusual(tensor)
    if not problem and tensor.is_floating_point() != expected.is_floating_point():
        problem = f"{tensor.dtype} for {expected.dtype}".replace("torch.", "")
    return problem


def _chosen(path: Path, found: object, expected: State) -> tuple[State, list[str]]:
    """The state dict, or the only one in a checkpoint, or the only one of several that fits."""
    state = _state(found)
    if state is not None:
        return state, []
    odd = [key for key in found if not isinstance(key, str)] if isinstance(found, Mapping) else []
    if odd:
        raise InputError(
            f"{path} must hold a state dict: names and tensors. It has the key {shown(odd[0])}, which is no name. Save "
            "model.state_dict()."
        )
    entries = {key: entry for key, value in _entries(found) if (entry := _state(value)) is not None}
    if not entries:
        raise InputError(f"{path} must hold a state dict: names and tensors. Save model.state_dict().")
    fitting = [key for key, entry in entries.items() if set(_unwrapped(entry, expected)[0]) == set(expected)]
    chosen = fitting or list(entries)
    if len(chosen) > 1:
        example = f'torch.save(checkpoint["{chosen[0]}"], file)'
        raise InputError(
            f"{path} holds several state dicts: {', '.join(chosen)}. Save the one to use alone: {example}."
        )
    return entries[chosen[0]], [f'the weights are the entry "{chosen[0]}" of the checkpoint {path}.']


def _entries(found: object) -> list[tuple[str, object]]:
    return [(str(key), value) for key, value in found.items()] if isinstance(found, Mapping) else []


def _state(found: object) -> State | None:
    """`found`, where it is names and tensors."""
    if not isinstance(found, Mapping) or not found:
        return None
    named = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())
    return dict(found) if named else None


def _unwrapped(state: State, expected: State) -> tuple[State, str]:
    """The state dict without what a wrapper put in front of all its names, and that."""
    for prefix in WRAPPERS:
        wrapped = all(key.startswith(prefix) for key in state)
        if wrapped and not any(key.startswith(prefix) for key in expected):
            return {key.removeprefix(prefix): value for key, value in state.items()}, prefix
    return state, ""
