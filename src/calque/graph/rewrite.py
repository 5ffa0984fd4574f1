"""Small rewrites of a traced graph: in-place operators made functional, constants evaluated."""

import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from calque.errors import CaptureError
from calque.graph.network import MOVEMENTS, is_movement


@contextmanager
def silent_tracing() -> Iterator[None]:
    """Keeps warnings and log lines of torch's own tracer, which users cannot act on, off their terminal."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def functionalize(graph: fx.Graph) -> fx.Graph:
    """The graph with every in-place operator replaced, in place, by the functional one that it names.

    Raises:
        CaptureError: a write into a view, an input or a buffer, whose aliases a graph of values cannot follow.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not _writes(node):
            continue
        written = node.args[0]
        packet = getattr(torch.ops.aten, str(node.target).split(".")[1].rstrip("_"), None)
        overload = getattr(packet, str(node.target).split(".")[-1], None)
        if not isinstance(written, fx.Node) or overload is None or written.op != "call_function" or _aliased(written):
            raise CaptureError(
                f"the network cannot be captured. {_line(node)} writes in place ({node.target}) into a view, an input or a "
                "buffer; write the result into a new tensor instead."
            )
        node.target = overload
        later = set()
        following = node.next
        while following.op != "root":
            later.add(following)
            following = following.next
        written.replace_all_uses_with(node, delete_user_cb=lambda user, later=later: user in later)
    return graph


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _aliased(node: fx.Node) -> bool:
    """Whether the value shares memory with another: a view, or read by a view."""
    views = [user for user in node.users if is_movement(user)]
    return is_movement(node) and node.target in MOVEMENTS or bool(views and node.target is not operator.getitem and _before(views))


def _before(views: list[fx.Node]) -> bool:
    return any(user.target in MOVEMENTS for user in views)


def _line(node: fx.Node) -> str:
    trace = [line.strip() for line in str(node.meta.get("stack_trace") or "").strip().splitlines()]
    return ": ".join(trace[-2:]) if len(trace) > 1 else node.name


def constant_value(module: fx.GraphModule, argument: object) -> Tensor | None:
    """The tensor of a node that depends on no input: a parameter, or computed from parameters (weight norm, say)."""
    if isinstance(argument, Tensor):
        return argument
    if not isinstance(argument, fx.Node):
        return None
    needed: dict[fx.Node, None] = {}
    pending = [argument]
    while pending:
        node = pending.pop()
        if node.op not in ("get_attr", "call_function"):
            return None
        needed[node] = None
        pending.extend(node.all_input_nodes)
    values: dict[fx.Node, object] = {}
    for node in module.graph.nodes:
        if node in needed:
            values[node] = _evaluate(module, node, values)
    result = values[argument]
    return result.detach() if isinstance(result, Tensor) else None


def _evaluate(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, object]) -> object:
    if node.op == "get_attr":
        owner: object = module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        return owner
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda child: values[child])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        assert callable(node.target)
        return node.target(*args, **kwargs)
