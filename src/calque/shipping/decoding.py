"""Codes of 2 to 8 bits as constants of an ONNX graph, and the nodes that decode them to int8 when the file is loaded.

8 bits are stored as INT8, 4 as INT4 behind a Cast. Other widths are sums of fields of 4, 2 and 1 bits; a byte of a field holds
several codes, which are looked up in a table: 256 bytes x the codes of one, computed from a few numbers at load, too.
"""

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

FIELDS = (4, 2, 1)  # widths of the packed parts of a code, the highest bits first
ROW = 8  # codes that fill whole bytes at every width


class Decoder:
    """The constants of one file, and what unpacks them."""

    def __init__(self) -> None:
        self.initializers: dict[str, TensorProto] = {}
        self._by_content: dict[bytes, str] = {}
        self._copies: dict[str, str] = {}  # owner of codes -> the last copy of them
        self._tables: set[str] = set()

    def constant(self, name: str, values: Array) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(values, name)
        return name

    def codes(self, values: Array, bits: int, name: str) -> Generator[onnx.NodeProto, None, str]:
        """The nodes that decode these codes to int8; returns the value's name."""
        output = f"{name}/int8"
        if bits == 8:
            codes = self.stored(values, bits, name)
            owner = self.owner(values, bits, name)
            if owner != name:
                # ONNX Runtime converts a layer's codes to uint8 under one name, and fails where two layers read the same ones;
                # each copy is one of the copy before, because it merges nodes with the same operands
                source = self._copies.get(owner, codes)
                yield helper.make_node("Reshape", [source, self._shape(values.shape)], [output])
                codes = self._copies[owner] = output
            return codes
        if bits == 4:
            codes = self.stored(values, bits, name)
            yield helper.make_node("Cast", [codes], [output], to=TensorProto.INT8)
        else:
            yield from self._fields(values, bits, name, output)
        return output

    def stored(self, values: Array, bits: int, name: str) -> str:
        """The tensor of these codes, of 4 or 8 bits; layers that share codes share it."""
        owner = self.owner(values, bits, name)
        if bits == 8:
            return self._packed(f"{owner}/codes", TensorProto.INT8, values.shape, values)
        return self._packed(f"{owner}/codes", TensorProto.INT4, values.shape, pack(values, 4))

    def owner(self, values: Array, bits: int, name: str) -> str:
        """The first layer with these codes."""
        key = repr((bits, values.shape)).encode() + values.tobytes()
        return self._by_content.setdefault(key, name)

    def _fields(self, values: Array, bits: int, name: str, output: str) -> Iterator[onnx.NodeProto]:
        """codes + 2^(bits - 1) as a sum of fields; the tables hold them shifted, the last of them less 2^(bits - 1)."""
        whole = np.pad(values.astype(np.int32).reshape(-1) + (1 << (bits - 1)), (0, -values.size % ROW))
        owner, total, rest = self.owner(values, bits, name), "", bits
        for width in fields(bits):
            rest -= width
            part = f"{name}/{rest}"
            packed = pack((whole >> rest) & ((1 << width) - 1), width).reshape(-1, *_halves(width))
            stored = self._packed(f"{owner}/packed{rest}", TensorProto.UINT8, packed.shape, packed)
            table = yield from self._table(width, bits, rest)
            yield helper.make_node("Cast", [stored], [f"{part}i"], to=TensorProto.INT32)
            yield helper.make_node("Gather", [table, f"{part}i"], [value := f"{part}g"])
            if total:
                yield helper.make_node("Add", [total, value], [f"{part}t"])
                value = f"{part}t"
            total = value
        if whole.size > values.size:
            flat, ends = self.constant("flat", np.array([-1])), (0, values.size)
            yield helper.make_node("Reshape", [total, flat], [f"{name}/line"])
            cut = [self.constant(f"end/{end}", np.array([end])) for end in ends]
            yield helper.make_node("Slice", [f"{name}/line", *cut], [total := f"{name}/cut"])
        shaped = output if bits in FIELDS else f"{name}/shaped"
        yield helper.make_node("Reshape", [total, self._shape(values.shape)], [shaped])
        if shaped != output:
            yield helper.make_node("Cast", [shaped], [output], to=TensorProto.INT8)

    def _table(self, width: int, bits: int, shift: int) -> Generator[onnx.NodeProto, None, str]:
        """(256, ...): the fields of each byte, shifted; int8 where they are the codes, else int32, which runtimes add."""
        table = f"table/{bits}/{width}"
        if table in self._tables:
            return table
        self._tables.add(table)
        bytes_, divisors = (
            self.constant("bytes", np.arange(256, dtype=np.uint8).reshape(-1, 1)),
            self.constant(f"divisors/{width}", _divisors(width)),
        )
        steps = [("Div", divisors), ("Mod", self._number(1 << width))]
        steps += [("Mul", self._number(1 << shift))] if shift else [("Sub", self._number(1 << (bits - 1)))]
        yield helper.make_node("Cast", [bytes_], [value := f"{table}/bytes"], to=TensorProto.INT32)
        for operator, operand in steps:
            yield helper.make_node(operator, [value, operand], [value := f"{table}/{operator}"])
        shape = self._shape((256, *_halves(ROW // width)))
        if bits in FIELDS:
            yield helper.make_node("Cast", [value], [value := f"{table}/int8"], to=TensorProto.INT8)
        yield helper.make_node("Reshape", [value, shape], [table])
        return table

    def _number(self, value: int) -> str:
        return self.constant(f"int32/{value}", np.array(value, dtype=np.int32))

    def _shape(self, shape: tuple[int, ...]) -> str:
        return self.constant(f"shape/{shape}", np.array(shape))

    def _packed(self, name: str, kind: int, shape: tuple[int, ...], values: Array) -> str:
        if name not in self.initializers:
            self.initializers[name] = helper.make_tensor(name, kind, shape, values.tobytes(), raw=True)
        return name


def fields(bits: int) -> list[int]:
    """The widths whose sum is `bits`.

    >>> fields(7), fields(2)
    ([4, 2, 1], [2])
    """
    return [width for width in FIELDS if bits & width]


def _halves(count: int) -> list[int]:
    """The axes, of 2 each, of a power of two; the bytes of a row and the codes of a byte together are 2 x 2 x 2."""
    return [2] * (count.bit_length() - 1)


def _divisors(width: int) -> Array:
    return (1 << np.arange(0, ROW, width, dtype=np.int32)).reshape(1, -1)


def pack(values: Array, width: int) -> Array:
    """Codes of 1, 2, 4 or 8 bits in bytes, the first in the lowest bits, as ONNX stores INT4."""
    per = ROW // width
    low = (values.reshape(-1) & ((1 << width) - 1)).astype(np.uint8)
    low = np.pad(low, (0, -low.size % per)).reshape(-1, per)
    packed: Array = (low << np.arange(0, ROW, width, dtype=np.uint8)).sum(1).astype(np.uint8)
    return packed
