"""Copies of the user's network, which stays untouched: weights are numbers as they stand, whatever computed them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from calque.errors import CaptureError


class _WithoutHistory(TorchFunctionMode):
    """Copies computed tensors, which torch refuses to copy, without what they were computed from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            value, memo = args
            memo[id(value)] = value.detach().clone()
            return memo[id(value)]
        return func(*args, **(kwargs or {}))


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy whose weights are parameters of their own where hooks computed them: pruning, old spectral and weight norm.

    Raises:
        CaptureError: something in the network cannot be copied; the module that keeps it is named.
    """
    try:
        result: nn.Module = _copied(model)
    except Exception as error:
        raise CaptureError(f"the network cannot be copied: {_culprit(model) or _first_line(error)}") from error
    for module in result.modules():
        _settle(module)
    return result


def private_copy(model: nn.Module) -> nn.Module:
    """A duplicate in eval mode. Raises CaptureError where the model cannot be copied."""
    return duplicate(model).eval()


def _copied(value: Any) -> Any:
    with _WithoutHistory():
        return copy.deepcopy(value)


def _settle(module: nn.Module) -> None:
    """Makes, in place, weights that a hook computes before each forward parameters with their values."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)


def _culprit(model: nn.Module) -> str | None:
    """The first attribute of a module that cannot be copied, why not, and what to do."""
    inside = {"_parameters", "_buffers", "_modules"}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in inside or isinstance(value, nn.Module):
                continue
            try:
                _copied(value)
            except Exception as error:  # whatever its __deepcopy__ raises
                owner = f"module {path} ({type(module).__name__})" if path else f"the network ({type(module).__name__})"
                where = f'model.get_submodule("{path}").{name}' if path else f"model.{name}"
                return (
                    f"{owner} keeps a {type(value).__name__} in {name!r}: {_first_line(error)} Delete it before "
                    f"quantizing (del {where}), or make it anew in forward."
                )
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".") + "."


def moved_to(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself where all of it is on the device already, else a copy there."""
    tensors = (*model.parameters(), *model.buffers())
    if all(tensor.device == device for tensor in tensors):
        return model
    return duplicate(model).to(device)
