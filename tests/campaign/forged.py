"""Files with a right checksum and wrong contents: every field of the metadata and every tensor, changed one at a time.

A file passes where it is refused with one error that names it and the rule, or where it loads as an equal network. What no rule
can tell from the truth is not tried: another code of a weight, another scale of a channel with its bias's.

python -m tests.campaign.forged [--limit SECONDS]
"""

import argparse
import json
import math
import random
import resource
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import calque
from calque.errors import LoadError

METADATA = "calque"
LONGEST_MESSAGE = 1000
MOST_GROWTH = 512 * 1024  # kilobytes of memory that opening a small file may take above all before
Place = tuple[str | int, ...]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


# What may stand where something else belongs.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 9, 33, 2**31, 10**30, 0.5, -1.0, 1e-45, 1e308, math.nan, math.inf, -math.inf, "", "8", "w9a9",
    "float", "nan", "x" * 5000, "a\nb", [], [0], [-1], [10**12, 10**12], ["x"], {}, {"x": 1}, {"tensor": 1}, nested(80),
)  # fmt: skip


@dataclass(frozen=True)
class Forgery:
    """A forged file: what was changed, and the bytes."""

    name: str
    content: bytes


def metadata_forgeries(content: bytes) -> Iterator[Callable[[], Forgery]]:
    """Every position of the JSON under every value of VALUES, without itself, beside an unknown field, and doubled."""
    table, tensors = opened(content)
    for place in places(table):
        for value in VALUES:
            yield lambda place=place, value=value: _forged(
                f"{place} = {value!r:.60}", _put(table, place, value), tensors
            )  # type: ignore[misc]
        yield lambda place=place: _forged(f"{place} deleted", _without(table, place), tensors)  # type: ignore[misc]
        if isinstance(_at(table, place), dict):
            yield lambda place=place: _forged(f"{place} + unknown", _put(table, (*place, "unknown"), 1), tensors)  # type: ignore[misc]
        if isinstance(_at(table, place), list):
            longer = [*_at(table, place), *_at(table, place)[-1:]]
            yield lambda place=place, longer=longer: _forged(f"{place} longer", _put(table, place, longer), tensors)  # type: ignore[misc]
    for field in table:
        text = json.dumps(table, separators=(",", ":"))
        doubled = "{" + f'"{field}":{json.dumps(table[field])},' + text[1:]
        yield lambda field=field, doubled=doubled: Forgery(f"{field} twice", sealed(doubled, tensors))  # type: ignore[misc]


def tensor_forgeries(content: bytes) -> Iterator[Callable[[], Forgery]]:
    """Every tensor without itself, under another name, of other types and shapes, and with values that its rules exclude."""
    table, tensors = opened(content)
    for key, value in tensors.items():
        for what, changed in _changes(key, value):
            yield lambda key=key, what=what, changed=changed: _forged(  # type: ignore[misc]
                f"{key} {what}", table, {**{k: v for k, v in tensors.items() if k != key}, **changed}
            )
    for key in ("layer:nothing:scale", "float:nothing", "input:7", "else"):
        yield lambda key=key: _forged(f"{key} added", table, {**tensors, key: torch.ones(2)})  # type: ignore[misc]


def _changes(key: str, value: Tensor) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "deleted", {}
    yield "renamed", {f"{key}_": value}
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.int32,
    ):
        if dtype != value.dtype:
            yield f"as {dtype}", {key: value.to(dtype)}
    yield "of one more axis", {key: value[None]}
    yield "as a scalar", {key: value.flatten()[:1].sum().to(value.dtype)}
    yield "empty", {key: value.flatten()[:0]}
    if value.numel() > 1:
        yield "shorter", {key: value[:-1].contiguous()}
        yield "longer", {key: torch.cat([value, value[:1]])}
    wrong: tuple[float, ...] = ()
    if value.is_floating_point():
        wrong = (math.nan, math.inf, -math.inf)
    if key.endswith("scale"):
        wrong = (*wrong, 0.0, -1.0, 1e-45)
    if key.startswith("layer:") and key.endswith(":bias") and value.dtype == torch.int32:
        wrong = (2**31 - 1, -(2**31))
    for number in wrong if value.numel() else ():
        changed = value.clone()
        changed.view(-1)[-1] = number
        yield f"with {number}", {key: changed}


def judge(
    forgery: Forgery, path: Path, load: Callable[[Path], Callable[[Tensor], Tensor]], inputs: Tensor, expected: Tensor
) -> str:
    """What is wrong with how a forged file is loaded; "" where it is refused by name, or is an equal network.

    Args:
        path: where the file is written.  load: opens it.
        inputs, expected: of the true network, and what it makes of them.
    """
    path.write_bytes(forgery.content)
    try:
        result = load(path)
        try:
            found = result(inputs)
        except (TypeError, ValueError) as error:  # a network for images of another size, and it says so
            return "" if "was captured" in str(error) else f"{forgery.name}: raw {type(error).__name__}: {error}"
    except LoadError as error:
        message = str(error)
        if str(path) not in message:
            return f"{forgery.name}: the file is not named: {message[:200]}"
        if len(message) > LONGEST_MESSAGE:
            return f"{forgery.name}: the message has {len(message)} characters: {message[:200]}"
        return "" if message.endswith(".") else f"{forgery.name}: no sentence: {message[:200]}"
    except Exception as error:  # what a user would see as a traceback
        return f"{forgery.name}: raw {type(error).__name__}: {str(error)[:200]}"
    return "" if torch.equal(found, expected) else f"{forgery.name}: loaded as another network"


def opened(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata, without its checksum, and the tensors of a file."""
    length = struct.unpack("<Q", content[:8])[0]
    table = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
    del table["checksum"]
    return table, safetensors.torch.load(content)


def sealed(text: str, tensors: dict[str, Tensor]) -> bytes:
    """A file of that JSON and these tensors, with the checksum that is right for them."""
    table = json.loads(text)
    total = zlib.crc32(json.dumps(table, separators=(",", ":")).encode()) if isinstance(table, dict) else 0
    for key in sorted(tensors):
        value = tensors[key]
        values = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        total = zlib.crc32(values, zlib.crc32(key.encode(), total))
    checksum = f'"checksum":"{total:08x}"'
    return safetensors.torch.save(tensors, {METADATA: f"{text[:-1]}{',' if len(text) > 2 else ''}{checksum}}}"})


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Every position in a JSON value but the root."""
    if here:
        yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in entries:
        yield from places(part, (*here, key))


def _forged(name: str, table: dict[str, Any], tensors: dict[str, Tensor]) -> Forgery:
    return Forgery(name, sealed(json.dumps(table, separators=(",", ":")), tensors))


def _at(table: Any, place: Place) -> Any:
    for key in place:
        table = table[key]
    return table


def _put(table: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    changed = deepcopy(table)
    _at(changed, place[:-1])[place[-1]] = value
    return changed


def _without(table: dict[str, Any], place: Place) -> dict[str, Any]:
    changed = deepcopy(table)
    del _at(changed, place[:-1])[place[-1]]
    return changed


class _Network(nn.Module):
    """A residual add, a batch norm, an embedding, a buffer and a constant that stay float; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.words, self.head = nn.BatchNorm2d(8), nn.Embedding(5, 8), nn.Linear(8, 3)
        self.register_buffer("gain", torch.tensor([0.5]))

    def forward(self, image: Tensor, word: Tensor) -> Tensor:
        x = self.first(image).relu()
        x = self.norm(self.again(x) + x)
        x = self.again(x) * self.gain + torch.tensor(0.25)
        y: Tensor = self.head(x.mean((2, 3)) + self.words(word))
        return y


def campaign(limit: float, seed: int = 0) -> tuple[Counter[bool], list[str]]:
    """Forgeries in random order until so many seconds are spent: how many are right and wrong, and what the latter did."""
    generator = torch.Generator().manual_seed(seed)
    images, words = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(5, (32,), generator=generator)
    q = calque.quantize(_Network().eval(), {"image": images, "word": words}, bits="w3a5", recipe="nearest")
    counts, wrong, started = Counter[bool](), list[str](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="calque-forged-") as folder:
        path = Path(folder) / "q.safetensors"
        calque.save(q, path)
        content = path.read_bytes()
        forgeries = [*tensor_forgeries(content), *metadata_forgeries(content)]
        random.Random(seed).shuffle(forgeries)

        def load(path: Path) -> Callable[[Tensor], Tensor]:
            loaded = calque.load(path, _Network())
            return lambda inputs: loaded(inputs, words)

        for forge in forgeries:
            forgery, before = forge(), _peak()
            problem = judge(forgery, path, load, images, q(images, words))
            if not problem and _peak() - before > MOST_GROWTH:
                problem = f"{forgery.name}: {(_peak() - before) // 1024} MB were taken"
            counts[not problem] += 1
            wrong += [problem] if problem else []
            if time.monotonic() - started > limit:
                break
    return counts, wrong


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Prints what went wrong, and counts of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    torch.set_num_threads(1)
    counts, wrong = campaign(parser.parse_args().limit)
    print("\n".join(wrong) or "nothing went wrong")
    print(f"forged files: tried {counts.total()}, right {counts[True]}, wrong {counts[False]}")


if __name__ == "__main__":
    main()
