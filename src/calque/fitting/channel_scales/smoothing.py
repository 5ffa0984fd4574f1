"""Channel scales in front of linear layers: what is hard in their inputs moves into their weights.

The outputs of layer norms (and products, and GELUs) have a few channels many times larger than the others, and one grid for
all of them leaves the small ones a few codes. x W^T = (x / s) (W s)^T for any positive scales s, one per channel: 1 / s goes
into the layer norm's gain and bias where nothing else reads it, into the value projection where only attention is between, and
is a factor of its own elsewhere. The network computes what it computed before.

Sources: SmoothQuant (2211.10438), with the exponents of each group of layers chosen by the error of their quantized outputs, as
AWQ (2306.00978) chooses them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from calque.calibration.batches import real_tokens
from calque.calibration.execution import Execution
from calque.calibration.job import Job
from calque.grid.arithmetic import SMALLEST_SCALE, affine_grid, binary_unit, fake_quantize, per_channel, weight_limits
from calque.grid.bits import Bits, Placement
from calque.grid.ranges import weight_scale
from calque.network import Network, WeightedLayer
from calque.network.network import AVERAGE_POOLS, MAX_POOLS, is_movement, is_spatial_mean
from calque.network.rewrites.factors import Group, multiply_inputs
from calque.network.rewrites.functional import free_name
from calque.network.tensors import root, shared_tensors

log = logging.getLogger(__name__)
aten = torch.ops.aten

EXPONENTS = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (0.5, 0.5), (0.75, 0.25))
"""Tried: s = |x|^a / |W|^b by channel, largest values. The first leaves everything as it is."""
CLIPS = (1.0, 0.8, 0.6, 0.45)  # shares of the range of x that are tried with each
GAIN = 0.9  # of the error without scales: a smaller gain is not worth an operator
ROWS = 1024  # that judge
POOLS = AVERAGE_POOLS | MAX_POOLS
LARGEST = 1e4  # ratio of two scales
SILENT = 1e-6  # of the largest channel
CONSTANT = 1e-30  # of the squared size of outputs: the power of those that are the same everywhere


def smooth(job: Job, choices: Mapping[str, Sequence[Bits]]) -> tuple[Network, bool]:
    """The job's network with channel scales wherever they help the linear layers whose inputs will be quantized; if any do.

    The network's module is changed in place. One float pass up to the last such layer; none where there is none.

    Args:
        choices: the bits that each layer has, or may have; the middle one judges.
    """
    network = job.network
    groups = linear_groups(network, choices, job.placement)
    if not groups:
        return network, False
    with job.store() as store:
        execution = Execution(network.module, job.batches, store)
        found: dict[Group, Tensor] = {}
        for node in network.nodes():
            execution.step(node)
            names = groups.pop(node, None)
            if names is not None:
                values = real_tokens(execution.values(node), job.masks)
                rows = _rows(values, len(job.batches), job.generator(f"scales {names[0]}"))
                scale = best_scale(rows, [network.weighted(name).weight for name in names], _bits(choices, names))
                if scale is not None:
                    found[names] = scale
            execution.release(node)
            if not groups:
                break
    for names, scale in found.items():
        if not (_into_norm(network, names, scale) or _into_value(network, job, names, scale)):
            network = multiply_inputs(network, names, scale)
            continue
        for name in names:
            layer = network.weighted(name)
            network.module.set_submodule(name, WeightedLayer(layer.geometry, layer.weight * scale, layer.bias))
    network.module.recompile()
    return network, bool(found)


def linear_groups(
    network: Network, choices: Mapping[str, Sequence[Bits]], placement: Placement
) -> dict[fx.Node, Group]:
    """By the tensor that they read, the linear layers that may share channel scales.

    None that shares its weights, reads a clipped layer (`calque.fitting.channel_scales.migration` has these), a pool, or what
    is on a grid anyway.
    """
    tied = {*network.shared, *network.shared.values()}
    clipped = {layer.result for layer in network.layers.values() if layer.result is not layer.node}
    gridded = set(shared_tensors(network)) if placement == "integer" else set()
    readers: dict[fx.Node, list[str]] = {}
    for name, layer in network.layers.items():
        quantized = any(bits.activation is not None for bits in choices[name])
        source = layer.node.args[0]
        if network.weighted(name).geometry.kind == "linear" and quantized and name not in tied:
            assert isinstance(source, fx.Node)
            origin = root(source)
            pooled = origin.target in POOLS or is_spatial_mean(origin)
            if origin.op != "placeholder" and not pooled and origin not in clipped | gridded:
                readers.setdefault(source, []).append(name)
    return {source: tuple(names) for source, names in readers.items()}


def _bits(choices: Mapping[str, Sequence[Bits]], names: Group) -> Bits:
    options = [bits for bits in choices[names[0]] if bits.activation is not None]
    return options[len(options) // 2]


def _rows(values: Iterator[Tensor], batches: int, generator: torch.Generator) -> Tensor:
    """About ROWS random rows (R, K), as many of each batch."""

    def some(value: Tensor) -> Tensor:
        rows = value.reshape(-1, value.shape[-1])
        return rows[torch.randint(len(rows), (-(-ROWS // batches),), generator=generator).to(rows.device)]

    return torch.cat([*map(some, values)])


@torch.no_grad()
def best_scale(rows: Tensor, weights: Sequence[Tensor], bits: Bits) -> Tensor | None:
    """The scales (K,) with the least output error of layers with these weights at these bits; None where none helps.

    Args:
        rows: inputs (R, K).  weights: (C_out, K) each.
    """
    width = bits.activation
    assert width is not None
    large = _above_zero(rows.abs().amax(0))
    weighty = _above_zero(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))
    exact = [rows @ weight.mT for weight in weights]
    units = [binary_unit(target) for target in exact]
    powers = [
        ((target - target.mean(0)) / unit).square().mean().clamp(min=CONSTANT)
        for target, unit in zip(exact, units, strict=True)
    ]

    def error(scale: Tensor) -> float:
        moved = [weight * scale for weight in weights]
        rounded = [_rounded(weight, bits.weight) for weight in moved]
        x = rows / scale
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        totals = []
        for clip in CLIPS:
            grid = affine_grid(low * clip, high * clip, width)
            codes = fake_quantize(x, *grid, 0, 2**width - 1)
            errors = [
                (((codes @ weight.mT - target) / unit).square().mean() / power).item()
                for weight, target, unit, power in zip(rounded, exact, units, powers, strict=True)
            ]
            totals.append(sum(errors))
        return min(totals)

    candidates = []
    for a, b in EXPONENTS:
        scale = large**a / weighty**b
        scale = scale / scale.log().mean().exp()
        candidates.append(scale.clamp(LARGEST**-0.5, LARGEST**0.5))
    errors = [error(scale) for scale in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    log.info("channel scales: error %.3g -> %.3g with exponents %s", errors[0], errors[best], EXPONENTS[best])
    return candidates[best] if errors[best] < GAIN * errors[0] else None


def _above_zero(largest: Tensor) -> Tensor:
    """The largest values by channel, those of silent channels a small part of the largest of all."""
    return largest.clamp(min=max(SILENT * largest.max().item(), SMALLEST_SCALE))


def _rounded(weight: Tensor, bits: int | None) -> Tensor:
    if bits is None:
        return weight
    scale = weight_scale(weight[None], bits, "minmax")[0]
    codes = (weight / per_channel(scale, weight)).round().clamp(*weight_limits(bits))
    return codes * per_channel(scale, weight)


def _into_norm(network: Network, names: Group, scale: Tensor) -> bool:
    """Divides, in place, the gain and bias of a norm that these layers alone read; whether there is such a norm."""
    norm = network.layers[names[0]].node.args[0]
    assert isinstance(norm, fx.Node)
    if norm.target not in (aten.layer_norm.default, aten.rms_norm.default):
        return False
    if set(norm.users) != {network.layers[name].node for name in names} or norm.args[1] != [len(scale)]:
        return False
    positions = (2, 3) if norm.target is aten.layer_norm.default else (2,)
    parts = [norm.args[position] if len(norm.args) > position else None for position in positions]
    if not isinstance(parts[0], fx.Node) or any(isinstance(part, fx.Node) and part.op != "get_attr" for part in parts):
        return False
    for part in parts:
        if isinstance(part, fx.Node):
            _replace_constant(network, norm, part, scale)
    return True


def _replace_constant(network: Network, reader: fx.Node, constant: fx.Node, scale: Tensor) -> None:
    """Gives the reader the constant over the scale: in place where it alone reads it, else under a name of its own."""
    path, _, leaf = str(constant.target).rpartition(".")
    owner = network.module.get_submodule(path)
    value = getattr(owner, leaf) / scale
    others = [
        node
        for node in network.nodes()
        if node.op == "get_attr" and node.target == constant.target and node is not constant
    ]
    if set(constant.users) == {reader} and not others:
        setattr(owner, leaf, value)
        return
    name = free_name(network.module, f"{reader.name}_{leaf}")
    network.module.register_buffer(name, value)
    with network.module.graph.inserting_before(reader):
        own = network.module.graph.get_attr(name)
    own.meta = dict(constant.meta)
    reader.replace_input_with(constant, own)


def _into_value(network: Network, job: Job, names: Group, scale: Tensor) -> bool:
    """Divides, in place, the value projection behind which only attention stands; whether the outputs stayed the same."""
    read = network.layers[names[0]].node.args[0]
    assert isinstance(read, fx.Node)
    source = root(read)
    product = next((each for each in network.products.values() if each.node is source), None)
    if product is None or len(names) > 1:
        return False
    value = root(product.operands[-1])
    name = str(value.target)
    if (
        value.op != "call_module"
        or name not in network.layers
        or not _leads_only_to(value, product.node)
        or not _leads_only_to(source, network.layers[names[0]].node)
    ):
        return False
    before, reader = network.weighted(name), network.weighted(names[0])
    tied = {*network.shared, *network.shared.values()}
    if before.geometry.kind != "linear" or before.weight.shape[0] != len(scale) or name in tied:
        return False
    batch = job.example
    with torch.no_grad():
        expected = network.module(*batch)
        module = network.module
        module.set_submodule(name, WeightedLayer(before.geometry, before.weight / scale[:, None], before.bias / scale))
        module.set_submodule(names[0], WeightedLayer(reader.geometry, reader.weight * scale, reader.bias))
        found = module(*batch)
        module.set_submodule(names[0], reader)
    if all(_close(one, other) for one, other in zip(expected, found, strict=True)):
        return True
    network.module.set_submodule(name, before)
    return False


def _close(expected: object, found: object) -> bool:
    """Whether an output is the same up to rounding; one that is no float tensor follows from others that are."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor) or not expected.is_floating_point():
        return True
    return torch.allclose(expected, found, rtol=0.0, atol=1e-4 * expected.abs().max().item())


def _leads_only_to(node: fx.Node, reader: fx.Node) -> bool:
    """Whether every value of the node ends in the reader, through operators that only move values (or ask for sizes)."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user is reader or user.target is aten.sym_size.int:
            continue
        if not is_movement(user):
            return False
        pending.extend(user.users)
    return True
