"""The file: safetensors with JSON and a checksum in its metadata, written whole or not at all."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calque.errors import LoadError, SpecError
from calque.run.fields import parse_json, shown
from calque.run.files import FilePath, write_whole

FORMAT = 1
METADATA = "calque"  # the key in the safetensors metadata; a second one would make the order of keys random

Tensors = dict[str, Tensor]


def write(path: FilePath, table: Mapping[str, Any], tensors: Tensors) -> None:
    """Writes tensors (on the CPU, contiguous) and a JSON table."""
    text = _text({**table, "checksum": _checksum(_text(table), tensors)})
    write_whole(path, safetensors.torch.save(tensors, {METADATA: text}))


def read(path: FilePath) -> tuple[dict[str, Any], Tensors]:
    """The checked metadata and tensors of a file."""
    with open(path, "rb"):  # a path that cannot be read is an OSError, not a damaged file
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise LoadError(f"{path} is not a safetensors file, or is damaged: {error}. Save it again.") from error
    if METADATA not in metadata:
        raise LoadError(f"{path} is a safetensors file, but not one of calque's. Write it with calque.save.")
    try:
        table = parse_json(metadata[METADATA])
    except SpecError as error:
        raise LoadError(f"{path} is damaged: {error} Save it again.") from error
    checksum = table.pop("checksum", None) if isinstance(table, dict) else None
    if checksum is None or _checksum(_text(table), tensors) != checksum:
        raise LoadError(f"{path} is damaged: its checksum does not fit its contents. Save it again.")
    version = table.get("format")
    if version != FORMAT:
        raise LoadError(f"{path} has format {shown(version)}; this version of calque reads {FORMAT}. Update calque.")
    return table, tensors


def deduplicate(tensors: Tensors) -> dict[str, str]:
    """Drops, in place, each tensor that equals an earlier one; returns its key -> the earlier key."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for key, value in list(tensors.items()):
        earlier = first.setdefault((value.dtype, value.shape, _bytes(value)), key)
        if earlier != key:
            aliases[key] = earlier
            del tensors[key]
    return aliases


def _text(table: Mapping[str, Any]) -> str:
    return json.dumps(table, separators=(",", ":"))


def _checksum(text: str, tensors: Tensors) -> str:
    total = zlib.crc32(text.encode())
    for key in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[key]), zlib.crc32(key.encode(), total))
    return f"{total:08x}"


def _bytes(value: Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
