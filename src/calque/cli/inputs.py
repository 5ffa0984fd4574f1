"""What a command line names: Python references, axes, overrides, budgets, bits and losses."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from calque.allocation.budget import Budget
from calque.errors import CalqueError
from calque.run.fields import shown

DIGITS = 4  # of an axis's number: what Python turns into an int ends far above
SHOWN = 3  # names of a list that an error gives


class InputError(CalqueError):
    """An argument of the command line that cannot be used."""


def find_function(reference: str) -> Callable[..., object]:
    """The function that "package.module:name" refers to; the current folder is importable.

    Raises:
        InputError: not of this form, or no such module, attribute or function.
    """
    module_name, colon, attribute = reference.partition(":")
    if not module_name or not colon or not attribute:
        raise InputError(f"a function is written package.module:name. Got {shown(reference)}.")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        hint = f". It is looked for in the current folder ({folder}) and in those of PYTHONPATH." if absent else ""
        raise InputError(
            f"{reference}: {module_name} cannot be imported: {type(error).__name__}: {error}{hint}"
        ) from error
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


def parse_overrides(texts: Iterable[str]) -> dict[str, str | None]:
    """Pattern -> bits, None for "float".

    >>> parse_overrides(["head.*=w8a8", "gate=float"])
    {'head.*': 'w8a8', 'gate': None}
    """
    result: dict[str, str | None] = {}
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern or not bits:
            raise InputError(f"an override is written pattern=bits or pattern=float. Got {shown(text)}.")
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
        if not name or not all(number.isdecimal() and len(number) <= DIGITS for number in numbers):
            raise InputError(f"dynamic axes are written argument:axis,axis, such as x:2,3. Got {shown(text)}.")
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
            raise InputError(f"a latency budget is written table.csv=milliseconds. Got {shown(latency)}.")
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
        raise InputError(f"{shown(text)} is not a number of milliseconds.") from error


def shortened(names: list[str]) -> str:
    """The first SHOWN of the names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
