"""Small rewrites of a traced graph: in-place operators made functional, constants evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from calque.errors import CaptureError
from calque.network.network import is_movement
from calque.network.silence import silent_thread

aten = torch.ops.aten

# Movements whose result never shares memory with their input.
_COPIES = frozenset(
    {
        aten.max_pool2d.default, aten.adaptive_max_pool2d.default, aten.clone.default, aten.index_select.default,
        aten.flip.default, aten.roll.default, aten.constant_pad_nd.default, aten.pad.default,
    }
)  # fmt: skip


@contextmanager
def silent_tracing() -> Iterator[None]:
    """Keeps warnings and log lines of torch's own tracer in this thread, which users cannot act on, off their terminal."""
    with silent_thread("torch", "onnxscript", "onnx_ir"):
        yield


def functionalize(graph: fx.Graph) -> fx.Graph:
    """The graph with every in-place operator replaced, in place, by the functional one that it names.

    Raises:
        CaptureError: a write into a view, an input or a buffer that is read behind it: a graph of values cannot follow aliases.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not _writes(node):
            continue
        written = node.args[0]
        packet = getattr(torch.ops.aten, str(node.target).split(".")[1].rstrip("_"), None)
        overload = getattr(packet, str(node.target).split(".")[-1], None)
        if not isinstance(written, fx.Node) or overload is None or _aliases_are_read(written, node):
            raise CaptureError(
                f"the network cannot be captured. {_line(node)} writes in place ({node.target}) into a view, an input or a "
                "buffer; write the result into a new tensor instead."
            )
        node.target = overload
        _replace_after(node, written)
    return graph


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _replace_after(node: fx.Node, written: fx.Node) -> None:
    """Makes every reader of `written` behind `node` read `node`."""
    written.replace_all_uses_with(node, delete_user_cb=_behind(node).__contains__)


def _behind(node: fx.Node) -> set[fx.Node]:
    later = set()
    following = node.next
    while following.op != "root":
        later.add(following)
        following = following.next
    return later


def _aliases_are_read(written: fx.Node, write: fx.Node) -> bool:
    """Whether a value that may share memory with `written`, its base or another view of that, is read behind the write."""
    base = written
    while _may_be_view(base):
        base = base.all_input_nodes[0]
    later, pending = _behind(write), [base]
    while pending:
        alias = pending.pop()
        if alias is not written and any(user in later for user in alias.users):
            return True
        pending.extend(user for user in alias.users if _may_be_view(user) and user is not write)
    return base.op == "get_attr"


def _may_be_view(node: fx.Node) -> bool:
    return is_movement(node) and node.target not in _COPIES


def _line(node: fx.Node) -> str:
    trace = [line.strip() for line in str(node.meta.get("stack_trace") or "").strip().splitlines()]
    return ": ".join(trace[-2:]) if len(trace) > 1 else node.name


def path_of(node: fx.Node) -> str:
    """The path of the innermost module in whose forward the node was traced; "" for the network itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def constant_value(module: fx.GraphModule, argument: object) -> Tensor | None:
    """The tensor of a node that depends on no input: a parameter, or computed from parameters (weight norm, say)."""
    if isinstance(argument, Tensor):
        return argument
    if not isinstance(argument, fx.Node):
        return None
    needed = constant_sources(argument)
    if needed is None:
        return None
    values: dict[fx.Node, object] = {}
    for node in module.graph.nodes:
        if node in needed:
            values[node] = _evaluate(module, node, values)
    result = values[argument]
    return result.detach() if isinstance(result, Tensor) else None


def constant_sources(argument: object) -> set[fx.Node] | None:
    """The node and all that it is computed from; None where an input or a layer is among them."""
    needed: set[fx.Node] = set()
    pending = [argument] if isinstance(argument, fx.Node) else []
    while pending:
        node = pending.pop()
        if node.op not in ("get_attr", "call_function"):
            return None
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def _evaluate(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, object]) -> object:
    if node.op == "get_attr":
        owner: object = module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        return owner
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda child: cast("Any", values[child]))
    assert callable(node.target)
    with torch.no_grad():
        result: object = node.target(*args, **kwargs)
    return result


def free_name(module: nn.Module, wanted: str) -> str:
    """A name for something at the module's root: `wanted`, with underscores where the network has it already."""
    while hasattr(module, wanted):
        wanted += "_"
    return wanted


def drop_unread_buffers(module: fx.GraphModule) -> None:
    """Removes, in place, buffers that no operator reads (delete_all_unused_submodules keeps those beside a used module)."""
    used = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, _ in list(module.named_buffers(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        parts = name.split(".")
        if not any(".".join(parts[:end]) in used for end in range(1, len(parts) + 1)):
            delattr(module.get_submodule(path), leaf)


def erase_with_constants(node: fx.Node) -> None:
    """Removes the node, which nothing reads, and the constants that it alone read."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.op in ("get_attr", "call_function"):
            erase_with_constants(source)
