"""Files that no command should take: arrays, tensors, text, tables and what is no file at all."""

import io
import json
import os
import socket
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pth")
ROWS, SIDE = 16, 8
DEEP = 5000  # levels
DIGITS = 6000  # above what Python turns into an int


def images() -> Tensor:
    return torch.randn(ROWS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_of(header: str, content: bytes = b"", version: int = 1) -> bytes:
    """An .npy file with that header, whatever it says."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + content


def claimed(shape: str, kind: str = "<f4") -> bytes:
    """An .npy file of a few bytes that claims to have `shape`."""
    return npy_of(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}", bytes(256))


def npz(entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def pt(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def safe(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors)


def safe_of(header: str, content: bytes = b"") -> bytes:
    """A safetensors file with that header, whatever it says."""
    return struct.pack("<Q", len(header)) + header.encode() + content


def whole_files() -> dict[str, bytes]:
    """A good file of inputs of every kind."""
    array = images().numpy()
    return {
        ".npy": npy(array), ".npz": npz({"input.npy": npy(array)}), ".safetensors": safe({"input": images()}),
        ".pt": pt(images()), ".pth": pt({"input": images()}),
    }  # fmt: skip


def broken(suffix: str, good: bytes) -> Iterator[tuple[str, bytes]]:
    """Contents that are no file of this kind: other kinds, and a good one of which a part is missing or changed."""
    yield "text", b"these are no tensors\n"
    yield "empty", b""
    yield "one byte", b"\x80"
    yield "zeros", bytes(1000)
    yield "noise", bytes(np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8))
    yield "markup", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"
    yield "table", b"a,b\n1,2\n"
    yield "archive of text", npz({"readme.txt": b"hello"})
    for share in (0.01, 0.3, 0.6, 0.9):
        yield f"cut at {share:.0%}", good[: int(len(good) * share)]
    yield "first bytes zero", bytes(16) + good[16:]
    if suffix != ".safetensors":  # which has nothing behind its header that could be wrong
        yield "of another kind", safe({"input": images()})
    else:
        yield "of another kind", pt(images())


def arrays() -> dict[str, bytes]:
    """NumPy files that hold something else than inputs, by file name."""
    structured = np.zeros(4, dtype=[("a", "f4"), ("b", "i4")])
    ragged = np.empty(2, dtype=object)
    ragged[:] = [[1, 2], [3]]
    good = npy(images().numpy())
    one = npz({"input.npy": good})
    return {
        "object.npy": npy(np.array([{"a": 1}, None], dtype=object)), "ragged.npy": npy(ragged),
        "structured.npy": npy(structured),
        "complex.npy": npy(images().numpy().astype(np.complex64)),
        "complex128.npy": npy(np.ones((4, 1, 8, 8), np.complex128)),
        "dates.npy": npy(np.array(["2020-01-01"], dtype="datetime64[D]")), "words.npy": npy(np.array(["a", "b"])),
        "bytes.npy": npy(np.array([b"a", b"b"])), "longdouble.npy": npy(np.ones((4, 1, 8, 8), np.longdouble)),
        "durations.npy": npy(np.array([1, 2], dtype="timedelta64[s]")), "void.npy": npy(np.zeros(4, dtype="V8")),
        "huge.npy": claimed("(1000000000000,)"), "huge rows.npy": claimed("(100000000000, 1, 8, 8)"),
        "overflow.npy": claimed("(4611686018427387904, 4611686018427387904)"),
        "above int.npy": claimed("(1" + "0" * 30 + ",)"),
        "negative.npy": claimed("(-1, 1, 8, 8)"), "shape of text.npy": claimed("('a',)"),
        "shape missing.npy": npy_of("{'descr': '<f4'}"),
        "no header.npy": npy_of("hello"), "deep.npy": npy_of("(" * 3000),
        "digits.npy": claimed("(" + "9" * DIGITS + ",)"),
        "unknown kind.npy": claimed("(4,)", "<q9"), "version 9.npy": npy_of("{}", version=9),
        "endless zero.npy": claimed("(0, 10000000000000000)"),
        "shorter.npy": claimed("(100, 1, 8, 8)"), "scalar.npy": npy(np.float32(1.0)),
        "no rows.npy": npy(np.zeros((0, 1, 8, 8), np.float32)),
        "no width.npy": npy(np.zeros((4, 1, 8, 0), np.float32)),
        "no channels.npy": npy(np.zeros((4, 0, 8, 8), np.float32)),
        "nan.npy": npy(np.full((4, 1, 8, 8), np.nan, np.float32)), "flat.npy": npy(np.ones(64, np.float32)),
        "three channels.npy": npy(np.ones((4, 3, 8, 8), np.float32)),
        "too small.npy": npy(np.ones((4, 1, 2, 2), np.float32)),
        "whole numbers.npy": npy(np.ones((4, 1, 8, 8), np.int64)), "half.npy": npy(np.ones((4, 1, 8, 8), np.float16)),
        "flags.npy": npy(np.ones((4, 1, 8, 8), np.bool_)), "seven axes.npy": npy(np.ones((1,) * 7, np.float32)),
        "infinite.npy": npy(np.full((4, 1, 8, 8), np.inf, np.float32)),
        "vast.npy": npy(np.full((4, 1, 8, 8), 3e38, np.float32)),
        "no arrays.npz": npz({}), "object.npz": npz({"input.npy": npy(np.array([None], dtype=object))}),
        "huge.npz": npz({"input.npy": claimed("(1000000000000,)")}), "text inside.npz": npz({"input.npy": b"hello"}),
        "no array inside.npz": npz({"input.txt": b"hello"}),
        "other argument.npz": npz({"nothing.npy": good, "else.npy": good}),
        "wrong sum.npz": one[:200] + b"\xff" + one[201:], "structured.npz": npz({"input.npy": npy(structured)}),
        "shorter.npz": npz({"input.npy": good[:-40]}),
        "complex.npz": npz({"input.npy": npy(np.ones((4, 1, 8, 8), np.complex64))}),
        "huge compressed.npz": npz({"input.npy": claimed("(1000000000000,)")}, zipfile.ZIP_DEFLATED),
        "encrypted.npz": bytes(byte | (index in (6, one.index(b"PK\x01\x02") + 8)) for index, byte in enumerate(one)),
    }  # fmt: skip


def headers() -> dict[str, bytes]:
    """Safetensors files whose headers lie, by file name."""
    entry = '{"input":{"dtype":"%s","shape":%s,"data_offsets":[0,%d]}}'
    return {
        "long header.safetensors": struct.pack("<Q", 2**60) + b"{}", "deep.safetensors": safe_of('{"a":' + "[" * DEEP),
        "digits.safetensors": safe_of(entry % ("F32", f"[{'9' * DIGITS}]", 4), bytes(4)),
        "list.safetensors": safe_of("[]"),
        "huge.safetensors": safe_of(entry % ("F32", "[1000000000000]", 4 * 10**12)),
        "negative.safetensors": safe_of(entry % ("F32", "[-1]", 4), bytes(4)),
        "unknown kind.safetensors": safe_of(entry % ("Q9", "[1]", 4), bytes(4)), "no tensors.safetensors": safe({}),
        "shorter.safetensors": safe_of(entry % ("F32", "[100]", 400), bytes(4)),
        "not text.safetensors": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    }  # fmt: skip


def tensors() -> dict[str, object]:
    """What torch.save writes and no input is, by name."""
    x = images()
    return {
        "sparse": x.to_sparse(), "sparse rows": x[:, 0, 0].to_sparse_csr(), "meta": x.to("meta"),
        "float8": x.to(torch.float8_e4m3fn), "complex": x.to(torch.complex64), "half": x.half(),
        "bfloat16": x.bfloat16(),
        "whole numbers": x.long(), "flags": x > 0, "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([x[0, 0], x[1, 0, :4]], layout=torch.strided),
        "jagged": torch.nested.nested_tensor([x[0, 0], x[1, 0, :4]], layout=torch.jagged),
        "no rows": x[:0], "no width": x[..., :0], "scalar": x.sum(), "nan": x * torch.nan, "flat": x.flatten(),
        "expanded": torch.zeros(1).expand(4, 3, 8, 8), "a number": 3, "nothing": None, "text": "images",
        "empty list": [], "empty dict": {},
        "list of text": ["a", "b"], "dict of numbers": {"a": 1}, "dict of numbered tensors": {0: x, 1: x}, "set": {1, 2},
        "tuple of nothing": (), "list of nothing": [None], "uneven": [x, x[0]],
        "mixed": [x, x.long()], "unknown argument": {"nothing": x, "else": x}, "number as argument": {"input": 3},
    }  # fmt: skip


SPECIAL = ("missing", "directory", "pipe", "socket", "zero device", "null device", "dangling", "loop", "below a file")


def special(folder: Path, suffix: str) -> Iterator[tuple[str, str]]:
    """What is no regular file, by name, each with `suffix`; and paths that no system takes."""
    for kind in SPECIAL:
        path = folder / f"{kind}{suffix}"
        if kind == "directory":
            path.mkdir(exist_ok=True)
        elif kind == "pipe" and not path.exists():
            os.mkfifo(path)
        elif kind == "socket" and not path.exists():
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(path))  # its path may have 108 characters at most
        elif kind.endswith("device") and not path.is_symlink():
            path.symlink_to(f"/dev/{kind.split()[0]}")
        elif kind == "dangling" and not path.is_symlink():
            path.symlink_to(folder / "nowhere")
        elif kind == "loop" and not path.is_symlink():
            path.symlink_to(path)
        elif kind == "below a file":
            (folder / "plain").write_bytes(b"")
            path = folder / "plain" / f"x{suffix}"
        yield kind, str(path)
    yield "NUL", f"a\0b{suffix}"
    yield "surrogate", f"a\udc80b{suffix}"
    yield "long name", "x" * 300 + suffix
    yield "long path", "x/" * 3000 + f"x{suffix}"
    yield "no name", ""
    yield "home of nobody", f"~nobody-of-that-name/x{suffix}"
    yield "line break", f"a\nb{suffix}"


def shortened(name: str) -> str:
    """What an error shows of a path."""
    return name if len(name) < 4000 else name[:50]


def toml_texts() -> dict[str, bytes]:
    """Contents of no use as a plan or a recipe, by name."""
    return {
        "no TOML": b"{]", "empty key": b"= 3", "deep": b"a = " + b"[" * DEEP + b"]" * DEEP,
        "half deep": b"a = " + b"[" * 200 + b"]" * 200,
        "deep tables": b"a = " + b"{a=" * DEEP, "dotted": b".".join([b"a"] * DEEP) + b" = 1",
        "digits": b"a = " + b"9" * DIGITS,
        "negative digits": b"a = -" + b"9" * DIGITS, "hexadecimal": b"a = 0x" + b"f" * DIGITS,
        "not text": b"\xff\xfe\x00", "NUL": b"a = 1\0",
        "twice": b'a = 1\na = 2', "date": b"a = 2020-01-01", "infinite": b"a = inf", "list": b"a = [1, 2]",
        "number": b'"0" = 8',
        "flag": b'"0" = true', "bits above": b'"0" = "w99a8"', "no bits": b'"0" = "nonsense"', "text": b"hello\n",
        "binary": bytes(300),
        "surrogate": b'a = "\\ud800"', "empty table": b"[a]", "cut": b'"0" = "w8a8', "JSON": b'{"0": "w8a8"}',
        "empty text": b'"0" = ""',
    }  # fmt: skip


def json_texts(good: bytes) -> dict[str, bytes]:
    """Contents in place of a JSON file of a run, by name: none of them is what `good` is."""
    table = json.loads(good)
    first = next(iter(table))

    def with_first(value: object) -> bytes:
        return json.dumps({**table, first: value}).encode()

    return {
        "empty": b"", "cut": good[: len(good) // 2], "not text": b"\xff\xfe" + good, "deep": b"[" * 100_000,
        "half deep": b"[" * 200 + b"]" * 200,
        "deep objects": b'{"a":' * 100_000, "digits": b'{"a": ' + b"9" * DIGITS + b"}", "list": b"[]", "number": b"3",
        "nothing": b"null",
        "text": b'"a"', "infinite": b"Infinity", "empty object": b"{}",
        "unknown": good.rstrip()[:-1] + b', "unknown": 1}', "zeros": bytes(100),
        "more behind": good + b"{}", "twice": b'{"' + first.encode() + b'": 1, ' + good.lstrip()[1:],
        "field null": with_first(None),
        "field list": with_first([]), "field object": with_first({}), "field number": with_first(-1),
        "field vast": with_first(10**30),
        "field deep": with_first(json.loads("[" * 80 + "]" * 80)), "surrogate": with_first("\ud800"),
        "field flag": with_first(True),
        "without a field": json.dumps({key: value for key, value in table.items() if key != first}).encode(),
    }  # fmt: skip
