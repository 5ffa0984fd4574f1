"""One thread at a time where torch cannot do two things at once; what torch changes meanwhile is changed for that thread alone.

`torch.export` and `torch.onnx.export` replace methods of nn.Module and set flags for the whole process while they trace. Under
the lock each such change looks at the thread that reads it: the others run, fit and train as if nothing were traced. The lock is
the one that `torch.compile` holds while it compiles. Nothing keeps a user's thread from calling `torch.export`, `torch.fx` or
`torch.onnx.export` at the same moment: they take no lock.
"""

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.fx import _symbolic_trace


class _Turns:
    """Whose turn it is: a token for each turn, which only the thread that has it finds in its own memory."""

    def __init__(self) -> None:
        self.current: object | None = None
        self.own = threading.local()
        self.undo: list[Callable[[], None]] = []

    @property
    def token(self) -> object | None:
        return getattr(self.own, "token", None)


_TURNS = _Turns()


def _after_fork() -> None:
    """In a child process: the thread that had the turn, and the lock, does not exist here, unless it is the one that forked."""
    if _TURNS.token is None:
        for undo in reversed(_TURNS.undo):
            undo()
        _TURNS.undo.clear()
        _TURNS.current = None
        frames: Any = sys.modules.get("torch._dynamo.convert_frame")
        if frames is not None:
            frames.compile_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def exclusively() -> Iterator[None]:
    """Waits until no other thread of calque's traces, or compiles, and keeps the others waiting; a thread may enter it again."""
    with importlib.import_module("torch._dynamo.convert_frame").compile_lock:
        if _TURNS.token is not None:
            yield
            return
        _TURNS.own.token = _TURNS.current = object()
        try:
            with _tracing_for_this_thread():
                yield
        finally:
            _TURNS.own.token = _TURNS.current = None
            _TURNS.undo.clear()


class _PerThread:
    """A value as the thread that has this turn sees it, and as all others do."""

    def __init__(self, own: bool, others: bool):
        self.own, self.others, self.token = own, others, _TURNS.token

    def __bool__(self) -> bool:
        return self.own if _TURNS.token is self.token else self.others


class _Compiling(_PerThread):
    """True for this thread; for others False, and they trace nothing either: torch asks for (tracing and not compiling)."""

    def __bool__(self) -> bool:
        asked_by_fx = sys._getframe(1).f_code.co_name == "is_fx_symbolic_tracing"
        return super().__bool__() or (asked_by_fx and self.token is _TURNS.current)


@contextmanager
def for_this_thread(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While it lasts, an attribute of a class or module is `value` for this thread, whose turn it is, and unchanged for others.

    Args:
        value: a function in place of a function, or a bool in place of a bool.
    """
    assert _TURNS.token is not None
    if name not in vars(owner):  # another version of torch, which changes something else or nothing
        yield
        return
    original = vars(owner)[name]
    replaced: Any = _dispatched(value, original) if callable(value) else _PerThread(value, bool(original))

    def undo() -> None:
        if vars(owner)[name] is replaced:  # else somebody has replaced it since
            setattr(owner, name, original)

    _TURNS.undo.append(undo)
    setattr(owner, name, replaced)
    try:
        yield
    finally:
        undo()


def _dispatched(own: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    token = _TURNS.token

    @functools.wraps(others)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (own if _TURNS.token is token else others)(*args, **kwargs)

    return call


@contextmanager
def _tracing_for_this_thread() -> Iterator[None]:
    """Makes torch's tracers change nn.Module and their flags for this thread alone, and no switch of kernels at all."""
    export = importlib.import_module("torch.export._trace")
    modes = torch._ops._ModeStackStateForPreDispatch()  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        # One stack for all threads, which torch empties wherever it leaves the modes of a thread.
        stack.enter_context(for_this_thread(torch._ops, "mode_stack_state_for_pre_dispatch", lambda: modes))
        stack.enter_context(for_this_thread(_symbolic_trace._PatchedFnSetAttr, "patch", _patch_method))
        stack.enter_context(for_this_thread(export, "_compiling_state_context", _compiling))
        # Switches kernels off for the whole process, and other threads would compute with others. What it keeps out of graphs
        # (kernels for LSTM on a CPU) does not come into those that keep their recurrent operators whole.
        stack.enter_context(for_this_thread(export, "_ignore_backend_decomps", nullcontext))
        yield


def _patch_method(patch: Any) -> None:
    """In place of fx's own: the method is replaced for this thread alone."""
    replaced = _dispatched(patch.new_fn, patch.orig_fn)
    _TURNS.undo.append(lambda: setattr(patch.frame_dict, patch.fn_name, patch.orig_fn))
    setattr(patch.frame_dict, patch.fn_name, replaced)


@contextmanager
def _compiling() -> Iterator[None]:
    """In place of torch.export's own: this thread compiles, the others do not."""
    names = ("_is_compiling_flag", "_is_exporting_flag")
    before = [getattr(torch.compiler, name) for name in names]

    def undo() -> None:
        for name, value in zip(names, before, strict=True):
            setattr(torch.compiler, name, value)

    _TURNS.undo.append(undo)
    for name in names:
        setattr(torch.compiler, name, _Compiling(own=True, others=False))
    try:
        yield
    finally:
        undo()
