"""The call of `torch.export`, with errors that name the user's line."""

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.export._trace as tracer
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from calque.errors import CaptureError
from calque.network.compat import unguarded
from calque.network.outputs import flat_outputs
from calque.network.rewrites.functional import silent_tracing
from calque.network.rewrites.regions import open_regions
from calque.network.rewrites.shortcuts import without_shortcuts
from calque.network.signature import Batch, flatten, have_rows, laid_out, layout_of, leaf_names
from calque.network.silence import silent_prints
from calque.network.spelling import respell, respellings

# How torch begins to say that it cannot go on without a value.
_ON_DATA = ("Could not guard on data-dependent expression", "Could not extract specialized integer from data-dependent")

DynamicAxes = Mapping[str, Any]  # as torch.export's dynamic_shapes, without the batch axis


def require_float32(model: nn.Module) -> None:
    """Raises CaptureError where a parameter has another floating-point type."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise CaptureError(f"parameters must be float32. {name} is {parameter.dtype}. Convert it with .float().")


def distinct(batch: Batch) -> Batch:
    """The batch with every tensor copied: one tensor passed twice would be traced as one input."""
    copies: Batch = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, dict(batch))
    return laid_out(copies, layout_of(batch))


def trace(
    model: nn.Module, batch: Batch, dynamic: DynamicAxes | None, *, functional: bool = False
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """The model as a graph of operators that returns flat tensors, and their tree; the batch axis and `dynamic` stay free.

    Parameters have their own names, but for those that code cannot spell (`calque.network.spelling`).

    Args:
        functional: without operators that write into their arguments, views included; a few more are taken apart then.

    Raises:
        CaptureError: what cannot be traced, with the line; names in `dynamic` that are no inputs.
    """
    unknown = set(dynamic or {}) - set(batch)
    if unknown:
        raise CaptureError(f"dynamic names inputs of forward: {', '.join(batch)}. Got {', '.join(sorted(unknown))}.")
    leaves, spec = flatten(batch)
    shapes = []
    for name, leaf, batched in zip(leaf_names(batch), leaves, have_rows(batch), strict=True):
        extra = (dynamic or {}).get(name.partition("[")[0])
        axes = {**({0: Dim.AUTO} if batched else {}), **(extra if isinstance(extra, Mapping) else {})}
        shapes.append(axes if isinstance(leaf, Tensor) else None)
    try:
        with (
            silent_tracing(),
            silent_prints(tracer),
            torch.no_grad(),
            without_shortcuts(),
            flat_outputs(model) as trees,
        ):
            free = pytree.tree_unflatten(shapes, spec)
            program = torch.export.export(model, (), dict(batch), dynamic_shapes=free, strict=False)
            respell(program, respellings(model))
            open_regions(program)
            if functional:
                program = program.run_decompositions({})
            module = unguarded(program)
            tree = trees[-1] if trees else module._out_spec  # torch.export copies graphs, and their own forward runs
            assert isinstance(tree, pytree.TreeSpec)
            return module, tree
    except Exception as error:
        raise CaptureError(_explain(error)) from error


def _explain(error: Exception) -> str:
    """One sentence with the user's line and the tracer's first line."""
    text = str(error)
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    place = re.search(r"The following call raised this error:\s*(File .*?)\n\s*(.*)", text)
    if place:
        where = f"{place[1].strip()}: {place[2].strip()}"
    else:
        inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inside)]
        last = frames[-1] if frames else None
        where = f'File "{last.filename}", line {last.lineno}, in {last.name}: {last.line}' if last else "unknown line"
    if reason.startswith(_ON_DATA):
        reason = "what is done there depends on the values of a tensor."
    return (
        f"the network cannot be captured. {where} -- {reason} Control flow and shapes must not depend on the values of "
        "tensors; rewrite that line, or quantize the sub-module without it."
    )
