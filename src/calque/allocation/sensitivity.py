"""The price of each choice: how much the network's loss rises when one layer alone is at that choice.

Source: Hubara et al. 2021, section 3.2: all other layers stay at the base precision. Prices are measured after each layer's fit
and bias correction. A change in a layer needs only the operators that depend on it: the others are executed once.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calque.calibration.batches import rows_at_a_time
from calque.calibration.execution import execute
from calque.calibration.losses import Loss
from calque.network import Batch
from calque.network.signature import flatten, have_rows, layout_of, rows, select, split
from calque.run.checkpoint import Checkpoint, Piece

PRICED_ROWS = 32  # at a time: all values that later layers still read are held for so many rows

StandIns = Mapping[str, Sequence[nn.Module]]
"""By layer name, a module for each choice, from the layer's input in the base network to its real output."""


def thin(batches: list[Batch], count: int) -> list[Batch]:
    """About `count` rows, evenly spread over all batches; in batches of at most PRICED_ROWS where their forms agree."""
    total = sum(rows(batch) for batch in batches)
    wanted = torch.linspace(0, total - 1, min(count, total)).long()
    merged: dict[object, list[Batch]] = {}
    result: list[Batch] = []
    start = 0
    for batch in batches:
        mine = wanted[(wanted >= start) & (wanted < start + rows(batch))] - start
        start += rows(batch)
        if _shares(batch):
            # rows with a tensor that all of them share stay among themselves
            size = min(PRICED_ROWS, rows_at_a_time(batch))
            result.extend(select(batch, part) for part in torch.split(mine, size) if len(part))
        elif len(mine):
            part = select(batch, mine)
            form = tuple(repr(leaf.shape[1:] if isinstance(leaf, Tensor) else leaf) for leaf in flatten(part)[0])
            merged.setdefault(form, []).append(part)
    for parts in merged.values():
        whole = _joined(parts)
        result.extend(split(whole, min(PRICED_ROWS, rows_at_a_time(whole))))
    return result


def _shares(batch: Batch) -> bool:
    """Whether all rows share a tensor, or depend on each other."""
    layout = layout_of(batch)
    pairs = zip(flatten(batch)[0], have_rows(batch), strict=True)
    return (layout is not None and not layout.apart) or any(isinstance(leaf, Tensor) and not row for leaf, row in pairs)


def _joined(parts: list[Batch]) -> Batch:
    """The rows of all parts as one batch."""
    leaves = zip(*(flatten(part)[0] for part in parts), strict=True)
    joined = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in leaves]
    tree: Batch = pytree.tree_unflatten(joined, flatten(parts[0])[1])
    return tree


def measure_prices(
    float_module: fx.GraphModule,
    base: fx.GraphModule,
    stand_ins: StandIns,
    batches: list[Batch],
    loss: Loss,
    *,
    checkpoint: Checkpoint,
    on_layer: Callable[[str], None],
) -> tuple[float, dict[str, list[float]]]:
    """The base network's loss and, by layer, the rise of the loss of each choice; inf where it is not finite.

    Args:
        base: the network with every layer at the base precision.
        on_layer: called for each layer of each batch.
    """
    total = sum(rows(batch) for batch in batches)
    base_loss = 0.0
    sums = {name: [0.0] * len(modules) for name, modules in stand_ins.items()}
    needs = checkpoint.needs(base=_state(base), stand_ins=_state(*itertools.chain(*stand_ins.values())))
    for index, batch in enumerate(batches):
        piece = checkpoint.get(f"prices {index}", needs)
        if piece is None:
            found = _batch_losses(float_module, base, stand_ins, batch, loss, on_layer)
            checkpoint.put(f"prices {index}", Piece({}, {"losses": found}, needs))
        else:
            found = piece.facts["losses"]
        share = rows(batch) / total
        base_loss += share * found[""][0]
        for name, values in found.items():
            if name:
                sums[name] = [a + share * b for a, b in zip(sums[name], values, strict=True)]
    rises = {
        name: [value - base_loss if math.isfinite(value) else math.inf for value in values]
        for name, values in sums.items()
    }
    return base_loss, rises


def _state(*modules: nn.Module) -> Piece:
    """All tensors of the modules."""
    return Piece({f"{n}.{key}": x for n, part in enumerate(modules) for key, x in part.state_dict().items()}, {})


@torch.no_grad()
def _batch_losses(
    float_module: fx.GraphModule,
    module: fx.GraphModule,
    stand_ins: StandIns,
    batch: Batch,
    loss: Loss,
    on_layer: Callable[[str], None],
) -> dict[str, list[float]]:
    """On one batch, the loss of the base network (under "") and of every choice of every layer."""
    leaves = flatten(batch)[0]
    reference = float_module(*leaves)
    nodes = list(module.graph.nodes)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    values: dict[fx.Node, Any] = dict(zip((n for n in nodes if n.op == "placeholder"), leaves, strict=True))
    found: dict[str, list[float]] = {}
    for position, node in enumerate(nodes):
        name = str(node.target)
        if node.op == "call_module" and name in stand_ins:
            rest = Suffix(module, nodes[position:], dict(values))
            found[name] = [loss(reference, rest.outputs(part)).item() for part in stand_ins[name]]
            on_layer(name)
        if node.op != "placeholder":
            values[node] = execute(module, [node], values)
        if node.op == "output":
            found[""] = [loss(reference, values[node]).item()]
        for source in node.all_input_nodes:
            if last[source] is node:
                values.pop(source, None)
    return found


class Suffix:
    """What comes after one layer: executed again for each stand-in, what does not depend on the layer only once."""

    def __init__(self, module: fx.GraphModule, nodes: list[fx.Node], values: dict[fx.Node, Any]):
        """
        Args:
            nodes: the layer and everything behind it, in order.
            values: of all nodes in front of it that are still read.
        """
        self.module = module
        self.layer, *after = nodes
        reached = {self.layer}
        for node in after:
            if reached.intersection(node.all_input_nodes):
                reached.add(node)
        self.dependent = [node for node in after if node in reached]
        needed: set[fx.Node] = set()
        for node in reversed(after):
            if node in reached or node in needed:
                needed.update(source for source in node.all_input_nodes if source not in reached)
        self.values = values
        for node in after:
            if node in needed:
                self.values[node] = execute(module, [node], self.values)

    def outputs(self, stand_in: nn.Module) -> Any:
        """The network's output leaves with `stand_in` in the layer's place."""
        order = [self.layer, *self.dependent]
        return execute(self.module, order, self.values, {str(self.layer.target): stand_in})
