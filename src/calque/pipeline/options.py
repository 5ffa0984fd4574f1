"""The options of `quantize` by themselves, before any work: their types, and which of them go together."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from calque.allocation.budget import Budget
from calque.errors import SpecError
from calque.grid.bits import SEEDS, Bits, Plan
from calque.recipe import Recipe
from calque.run.fields import optional, shown, whole

MOST_WORKERS = 4096
MOST_REASON = 200  # characters of what torch says of a device

# What an option is, in types and in words; each may be None as well.
_FORMS: dict[str, tuple[tuple[type, ...], str]] = {
    "budget": ((Budget,), "budget is a calque.Budget, such as Budget(size=0.13)"),
    "plan": ((Plan,), 'plan is a calque.Plan, such as Plan.load("plan.toml")'),
    "override": ((Mapping,), 'override is a dict of patterns and bits, such as {"head.*": "w8a8", "*.gate": None}'),
    "recipe": ((str, os.PathLike, Recipe), "recipe is the name of a shipped one, a TOML file or a calque.Recipe"),
    "first_last": ((str,), 'first_last is "auto", bits such as "w8a8", or None'),
    "dynamic": ((Mapping,), 'dynamic is a dict of inputs and their axes, such as {"x": {2: torch.export.Dim.AUTO}}'),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises SpecError for an option of another type or value than it may have, or two that exclude each other.

    Args:
        options: of `quantize`, by name.
    """
    placement, seed, workers = options["placement"], options["seed"], options["workers"]
    if not isinstance(placement, str) or placement not in ("integer", "inputs"):
        raise SpecError(f'placement is "integer" or "inputs". Got {shown(placement)}.')
    whole(*SEEDS)("seed", seed)
    optional(whole(1, MOST_WORKERS))("workers", workers)
    for name, (types, what) in _FORMS.items():
        value = options[name]
        if value is not None and not isinstance(value, types):
            raise SpecError(f"{what}. Got {shown(value)}.")
    named = {f"override {shown(pattern)}": text for pattern, text in (options["override"] or {}).items()}
    if options["first_last"] != "auto":
        named["first_last"] = options["first_last"]
    for where, text in named.items():
        if text is not None:
            _check_parses(where, text)
    _check_bits(options["bits"], options["budget"], options["plan"])


def _check_parses(where: str, text: object) -> None:
    try:
        Bits.parse(text)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def find_device(device: object) -> torch.device:
    """The device, where torch can compute on it. Raises: SpecError."""
    if not isinstance(device, (str, torch.device)):
        raise SpecError(f'device is the name of one, such as "cpu" or "cuda:0". Got {shown(device)}.')
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise ValueError("tensors on it have no values")
        torch.zeros((), device=found)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0][:MOST_REASON].rstrip(".")
        raise SpecError(
            f"device {str(device)[:MOST_REASON]} cannot be used: {reason}. Name one that torch has here."
        ) from error
    return found


def _check_bits(bits: object, budget: Budget | None, plan: Plan | None) -> None:
    if isinstance(bits, Mapping):
        raise SpecError(
            f'bits are those of all layers, such as "w4a4"; those of single layers go into override. Got {shown(bits)}.'
        )
    several = isinstance(bits, (list, tuple))
    for text in bits if isinstance(bits, (list, tuple)) else (bits,):
        if text is not None and not isinstance(text, str):
            Bits.parse(text)  # which says how bits are written
    if budget is not None and plan is not None:
        raise SpecError("budget and plan exclude each other: a plan has the bits of every layer. Drop one of them.")
    if several and budget is None:
        raise SpecError(f"several bits are candidates that a budget chooses from. Got {shown(bits)} without a budget.")
    if budget is not None and not several:
        raise SpecError(f'a budget chooses from several bits, such as ("w8a8", "w4a4", "w2a4"). Got {shown(bits)}.')
