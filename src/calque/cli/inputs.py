"""What a command line names: Python references, weights, calibration files, axes and overrides."""

import functools
import importlib
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from calque.budget import Budget
from calque.errors import CalqueError

SHOWN = 3  # names of a list that an error gives
STATE = (
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
)  # the last parts of names in a state dict


class InputError(CalqueError):
    """An argument of the command line that cannot be used."""


def find_function(reference: str) -> Callable[..., object]:
    """The function that "package.module:name" refers to; the current folder is importable.

    Raises:
        InputError: not of this form, or no such module, attribute or function.
    """
    module_name, colon, attribute = reference.partition(":")
    if not module_name or not colon or not attribute:
        raise InputError(f"a function is written package.module:name. Got {reference!r}.")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        hint = f". It is looked for in the current folder ({folder}) and in those of PYTHONPATH." if absent else ""
        raise InputError(f"{module_name} cannot be imported: {type(error).__name__}: {error}{hint}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{module_name} has no {attribute}. Check the name in {reference}.")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise InputError(f"{reference} must be a function. Got {type(found).__name__}.")
    return found


def call(reference: str, *arguments: object) -> object:
    """What the function that `reference` names returns. Raises: InputError, also for all that it raises."""
    function = find_function(reference)
    try:
        return function(*arguments)
    except Exception as error:
        raise InputError(f"{reference} raised {type(error).__name__}: {error}") from error


def build_model(reference: str) -> nn.Module:
    """The module that the function returns, in eval mode. Raises: InputError."""
    model = call(reference)
    if not isinstance(model, nn.Module):
        raise InputError(f"{reference} must return an nn.Module. Got {type(model).__name__}.")
    return model.eval()


def evaluate_model(reference: str, model: nn.Module) -> float:
    """The number that the user's metric has for `model`. Raises: InputError."""
    result = call(reference, model)
    try:
        return float(result)  # type: ignore[arg-type]  # whatever is a number: a tensor, NumPy's
    except (TypeError, ValueError) as error:
        raise InputError(f"{reference} must return a number. Got {type(result).__name__}.") from error


def check_device(device: str | None) -> None:
    """Raises: InputError if torch cannot compute on it."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error


def load_calibration(path: Path) -> object:
    """The inputs in an .npy, .npz, .safetensors or .pt file: a tensor, or tensors by argument name.

    float64 arrays, NumPy's default, become float32.

    Raises:
        InputError: another kind of file, one that does not hold arrays, or one that holds weights.
    """
    readers = {
        ".npy": _numpy,
        ".npz": _numpy,
        ".safetensors": read_safetensors,
        ".pt": read_pickled,
        ".pth": read_pickled,
    }
    if path.suffix not in readers:
        raise InputError(f"a calibration file ends with {', '.join(readers)}. Got {path}.")
    found = readers[path.suffix](path)
    names = _weight_names(found)
    if names:
        raise InputError(
            f"{path} holds weights, not inputs: {shortened(names)}. Pass it with --weights, and inputs with --calibration."
        )
    return torch.utils._pytree.tree_map(_single, found)


def _weight_names(found: object) -> list[str]:
    """The names in a state dict, or in a checkpoint that has one; none where something else was found."""
    if not isinstance(found, Mapping) or not found:
        return []
    names = [str(name) for name in found]
    ends = [name.rpartition(".")[1:] for name in names]
    if all(last in STATE for _, last in ends) or any(
        dot and last in STATE for dot, last in ends
    ):  # no argument has a dot
        return names
    return next((inside for value in found.values() if (inside := _weight_names(value))), [])


def parse_overrides(texts: Iterable[str]) -> dict[str, str | None]:
    """Pattern -> bits, None for "float".

    >>> parse_overrides(["head.*=w8a8", "gate=float"])
    {'head.*': 'w8a8', 'gate': None}
    """
    result: dict[str, str | None] = {}
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern or not bits:
            raise InputError(f"an override is written pattern=bits or pattern=float. Got {text!r}.")
        result[pattern] = None if bits == "float" else bits
    return result


def parse_axes(texts: Iterable[str]) -> dict[str, dict[int, object]]:
    """Dynamic axes by argument name, as `quantize` takes them.

    >>> list(parse_axes(["x:2,3"])["x"])
    [2, 3]
    """
    result: dict[str, dict[int, object]] = {}
    for text in texts:
        name, _, axes = text.rpartition(":")
        numbers = axes.split(",")
        if not name or not all(number.isdecimal() for number in numbers):
            raise InputError(f"dynamic axes are written argument:axis,axis, such as x:2,3. Got {text!r}.")
        result[name] = dict.fromkeys(map(int, numbers), torch.export.Dim.AUTO)
    return result


def parse_budget(
    size: str | None,
    bops: str | None,
    activation_memory: str | None,
    latency: str | None,
    max_loss: float | None,
    minimize: str | None,
) -> Budget | None:
    """The budget that the options name; None where none is given.

    >>> parse_budget("0.13", None, None, None, None, None).size
    '0.13'
    """
    if all(value is None for value in (size, bops, activation_memory, latency, max_loss, minimize)):
        return None
    table: tuple[str, float] | None = None
    if latency is not None:
        path, equals, limit = latency.rpartition("=")
        if not equals or not path:
            raise InputError(f"a latency budget is written table.csv=milliseconds. Got {latency!r}.")
        table = (path, _number(limit))
    return Budget(
        size=size, bops=bops, activation_memory=activation_memory, latency=table, loss=max_loss,
        minimize=cast(Any, minimize),  # Budget checks it
    )  # fmt: skip


def parse_bits(text: str, *, several: bool) -> str | tuple[str, ...]:
    """Bits as `quantize` takes them: a tuple where a comma is, or where a budget chooses.

    >>> parse_bits("w8a8, w4a4", several=True)
    ('w8a8', 'w4a4')
    """
    parts = tuple(part.strip() for part in text.split(","))
    return parts if several or len(parts) > 1 else parts[0]


def parse_loss(text: str | None) -> Any:
    """The loss that a name or reference stands for; what a function raises becomes an InputError."""
    if text is None or ":" not in text:
        return text
    function = find_function(text)

    @functools.wraps(function)
    def loss(reference: object, output: object) -> object:
        try:
            return function(reference, output)
        except Exception as error:
            raise InputError(f"{text} raised {type(error).__name__}: {error}") from error

    return loss


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{text!r} is not a number of milliseconds.") from error


def _single(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def _numpy(path: Path) -> object:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            return {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} does not hold plain NumPy arrays: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with open(path, "rb"):  # a path that cannot be read is an OSError, not a damaged file
        pass
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file, or is damaged: {error}.") from error


def read_pickled(path: Path) -> object:
    """What torch.save wrote, tensors alone; loading runs no code. Raises: InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file that is none of torch's makes torch.load raise
        kind = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if kind:
            held = f"a Python object ({kind[1]}), as torch.save(model) writes it"
        elif "TorchScript" in str(error):
            held = "a TorchScript program"
        else:
            raise InputError(f"{path} is not a file of torch.save, or is damaged.") from error
        raise InputError(
            f"{path} holds {held}; calque loads tensors alone, which run no code. Save model.state_dict(), or a tensor for "
            "--calibration."
        ) from error


def shortened(names: list[str]) -> str:
    """The first SHOWN of the names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
