"""What stands around a call and would change what is captured or computed: kept out, or named where it cannot be."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch._compile import _disable_dynamo
from torch.utils import _python_dispatch

from calque.errors import SurroundingsError
from calque.network.compat import product_precisions

P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """The function outside of what its callers stand in: modes of this thread are left for the call and entered again.

    Those are autocast, inference and gradient mode, `torch.set_default_device`, modes that see each call of torch
    (FakeTensorMode) and numpy's error state. What belongs to the whole process is not touched: other threads compute under it.

    Raises:
        SurroundingsError: a default dtype that is not float32, a transform of torch.func, or a running torch.jit.trace.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _outside():
            return function(*args, **kwargs)

    return _disable_dynamo(call)  # torch.compile would trace into it


def require_exact_products(device: torch.device) -> None:
    """Raises SurroundingsError where float32 products may be computed with fewer bits on the device, or by other kernels."""
    if device.type == "cpu":
        lowered = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(), "tf32": torch.cpu._is_amx_tile_supported()}
    else:
        lowered = {"bf16": True, "tf32": True}
    found = [precision for precision in product_precisions(device) if lowered.get(precision)]
    if found:
        raise SurroundingsError(
            f"float32 products may be computed as {found[0]} on {device} (torch.set_float32_matmul_precision, torch.backends), "
            'and the codes would be others. Call torch.set_float32_matmul_precision("highest") first.'
        )


@contextmanager
def _outside() -> Iterator[None]:
    _refuse()
    with ExitStack() as stack:
        stack.enter_context(_without_modes())
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        yield


def _refuse() -> None:
    """Raises SurroundingsError for what can be neither left nor computed under."""
    if torch.get_default_dtype() != torch.float32:
        raise SurroundingsError(
            f"the default dtype is {torch.get_default_dtype()}, and calque computes in float32. Call "
            "torch.set_default_dtype(torch.float32) first."
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise SurroundingsError(
            "the call stands inside a transform of torch.func (vmap, grad, functionalize, ...), where tensors have no values of "
            "their own. Call it outside."
        )
    if torch._C._is_tracing():
        raise SurroundingsError("the call stands inside torch.jit.trace, which would record it. Call it outside.")


@contextmanager
def _without_modes() -> Iterator[None]:
    """Takes this thread's modes for functions and operators of torch off their stacks, and puts them back."""
    modes = []
    while torch._C._len_torch_function_stack():
        modes.append(torch._C._pop_torch_function_stack())
    try:
        with _python_dispatch._disable_current_modes():
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
