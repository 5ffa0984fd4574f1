"""Blocks of a quantized network fitted to the float network's, in order, each behind the already fitted prefix."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from calque.calibration.execution import Execution
from calque.calibration.job import Job
from calque.fitting.block import BlockFit, BlockProblem, fit_block
from calque.network.blocks import Block, find_blocks
from calque.quantized.assembled import Assembled, link_requantization
from calque.settings import Blocks

ROWS = 32  # inputs per step


def fit_blocks(job: Job, model: Assembled, how: Blocks) -> int:
    """Fits, in place, every block of the network whose layers are all quantized; returns how many there are.

    Source: Hubara et al. 2021, section 3, AdaQuant over a block. As many inputs serve as fit into half of the memory.
    """
    module = model.graph_module
    twins = {node.name: node for node in module.graph.nodes}
    blocks = {twins[b.end.name]: b for b in find_blocks(job.network) if all(name in model.layers for name in b.layers)}
    originals = {node.name: node for node in job.network.nodes()}
    keep = {twins[block.input.name]: end for end, block in blocks.items()}
    count = job.counter("blocks", len(blocks))
    with job.store() as store:
        reference = Execution(job.network.module, job.batches, store)
        shadow = Execution(module, job.batches, store, keep=keep)
        for node in module.graph.nodes:
            if node.op == "output":
                break
            shadow.step(node)
            original = originals.get(node.name)
            if original is not None:
                reference.step(original)
            if node in blocks:
                _fit(job, model, blocks[node], how, shadow, reference)
                count(blocks[node].layers[0])
            if original is not None:
                reference.release(original)
            shadow.release(node)
    link_requantization(module)
    return len(blocks)


def _fit(job: Job, model: Assembled, block: Block, how: Blocks, shadow: Execution, reference: Execution) -> None:
    module = model.graph_module
    twins = {node.name: node for node in module.graph.nodes}
    source, end = twins[block.input.name], twins[block.end.name]
    inputs = _together(shadow.values(source), job.memory // 4)
    targets = _together(reference.values(block.end), job.memory // 4)
    used = min(len(inputs), len(targets))
    problem = BlockProblem(module, source, end, inputs[:used], targets[:used])
    fixed = [name for name in block.layers if name in job.network.shared or name in job.network.shared.values()]
    generator = job.generator(f"block {block.end.name}")
    fit = fit_block(problem, how, rows=ROWS, generator=generator, fixed_codes=fixed)
    _put(module, fit)
    shadow.put(end, map(lambda x: _value(module, source, end, x), shadow.values(source)))


def _put(module: fx.GraphModule, fit: BlockFit) -> None:
    for target, part in {**fit.layers, **fit.quantizers}.items():
        module.set_submodule(target, part)
    link_requantization(module)


@torch.no_grad()
def _value(module: fx.GraphModule, source: fx.Node, end: fx.Node, x: Tensor) -> Tensor:
    return BlockProblem(module, source, end, x, x).run(x, {})


def _together(values: Iterator[Tensor], limit: int) -> Tensor:
    """The values of the first batches of one shape as one tensor of at most about `limit` bytes, one batch at least."""
    parts: list[Tensor] = []
    for value in values:
        if parts and (value.shape[1:] != parts[0].shape[1:] or sum(p.nbytes for p in parts) + value.nbytes > limit):
            break
        parts.append(value)
    return torch.cat(parts)
