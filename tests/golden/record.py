"""Hashes of quantized networks, and where they hold."""

import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from calque.quantized.modules import QuantizedLayer, Quantizer

PATH = Path(__file__).with_name("codes.json")
Record = dict[str, dict[str, str]]  # environment -> case -> hash


def environment() -> str:
    """What the order of float sums depends on: torch, the instruction set that it uses, and the processor's maker and model."""
    version = torch.__version__.split("+")[0]
    return f"torch {version}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return " ".join(fields.get(name, "?") for name in ("vendor_id", "cpu family", "model"))


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What decides a quantized network's outputs, in execution order; no name of a module of ours is in it."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            yield "codes", module.codes
            yield "scale", module.scale
            yield "bias", module.bias
            yield "bias scale", module.bias_scale if module.bias_scale is not None else torch.empty(0)
        elif isinstance(module, Quantizer):
            yield f"grid of {module.bits} bits", torch.stack((module.scale, module.zero_point.float()))
    for parameter in model.state_dict().values():
        if parameter.is_floating_point():
            yield "float", parameter


def fingerprint(model: nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 of kinds, shapes, types and bytes."""
    found = sorted(_digest(kind, tensor) for kind, tensor in tensors(model))
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def _digest(kind: str, tensor: Tensor) -> str:
    head = f"{kind} {tuple(tensor.shape)} {tensor.dtype} ".encode()
    return hashlib.sha256(head + tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def load() -> Record:
    record: Record = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    return record


def save(record: Record) -> None:
    PATH.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
