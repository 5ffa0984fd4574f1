"""ONNX nodes of quantizers and layers, by the rules that runtimes' fusions need (measured; see docs/howto/deploy.md).

uint8 activations with an integer Min below 8 bits, symmetric int8 weights per channel (4 bits packed as INT4 behind a Cast,
other widths as packed fields of 4, 2 and 1 bits behind Div and Mod, all of which fold at load), int32 biases, linear layers as
Reshape, Gemm, Reshape; MatMulNBits where groups of weights have scales of their own.
"""

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calque.export.lowering import DOMAIN, LAYER, QUANTIZE, TABLE
from calque.graph import Geometry
from calque.model import QuantizedModel
from calque.quantizers import QuantizedLayer, Quantizer

Array = np.ndarray[Any, Any]

CONTAINER_MAX = 255  # of uint8, where runtimes saturate
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
FIELDS = (4, 2, 1)  # widths of the packed parts of a code, the highest bits first


class Expander:
    """Rewrites one exported graph, replacing calque's named operators by standard nodes."""

    def __init__(self, model: QuantizedModel, ranks: dict[str, int]):
        self.layers = model.layers
        self.quantizers = model.quantizers
        self.ranks = ranks
        self.initializers: dict[str, TensorProto] = {}
        self._by_content: dict[bytes, str] = {}
        self._copies: dict[str, str] = {}  # owner of codes -> the last copy of them
        self._calls: dict[str, int] = {}
        self._grids: dict[str, Quantizer] = {}  # value name -> the grid it is on

    def expand(self, graph: onnx.GraphProto) -> None:
        """Replaces the nodes of `graph`, in place, and adds their constants."""
        nodes = []
        for node in graph.node:
            if node.domain != DOMAIN:
                nodes.append(node)
                continue
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            name = attributes["name"].decode()
            if node.op_type == QUANTIZE:
                nodes.extend(self._quantize(node.input[0], node.output[0], name, int(attributes["highest"])))
            else:
                assert node.op_type in (LAYER, TABLE)
                nodes.extend(self._layer(node.input[0], node.output[0], name))
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(self.initializers.values())

    def _constant(self, name: str, values: Array) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(values, name)
        return name

    def _quantize(self, x: str, y: str, edge: str, highest: int) -> Iterator[onnx.NodeProto]:
        call = self._calls[edge] = self._calls.get(edge, 0) + 1
        name = edge if call == 1 else f"{edge}#{call}"
        grid = self.quantizers[edge]
        self._grids[y] = grid
        scale = self._constant(f"{edge}/scale", grid.scale.cpu().numpy())
        zero = self._constant(f"{edge}/zero_point", grid.zero_point.cpu().numpy().astype(np.uint8))
        codes = f"{name}/codes"
        raw = codes if highest == CONTAINER_MAX else f"{name}/unclipped"
        yield helper.make_node("QuantizeLinear", [x, scale, zero], [raw], f"{name}/quantize")
        if highest != CONTAINER_MAX:
            limit = self._constant(f"limit/{highest}", np.array(highest, dtype=np.uint8))
            yield helper.make_node("Min", [raw, limit], [codes], f"{name}/clip")
        yield helper.make_node("DequantizeLinear", [codes, scale, zero], [y], f"{name}/dequantize")

    def _layer(self, x: str, y: str, name: str) -> Iterator[onnx.NodeProto]:
        layer = self.layers[name]
        if layer.geometry.kind == "embedding":
            yield from self._table(layer, x, y, name)
        elif layer.group is not None:
            yield self._blocks(layer, layer.group, x, y, name)
        elif layer.bias_scale is None:
            yield from self._weight_only(layer, x, y, name)
        else:
            yield from self._integer(layer, x, y, name)

    def _table(self, layer: QuantizedLayer, x: str, y: str, name: str) -> Iterator[onnx.NodeProto]:
        """An embedding: rows of int8 codes and their scales are looked up, and only these become float32."""
        codes = yield from self._codes(layer.codes.cpu().numpy(), layer.bits, name)
        scales = self._constant(f"{name}/scale", layer.scale.cpu().numpy()[:, None])
        found, scale = f"{name}/rows", f"{name}/row_scales"
        yield helper.make_node("Gather", [codes, x], [found], f"{name}/gather", axis=0)
        yield helper.make_node("Gather", [scales, x], [scale], f"{name}/gather_scales", axis=0)
        yield helper.make_node("Cast", [found], [f"{name}/levels"], f"{name}/cast", to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{name}/levels", scale], [y], name)

    def _integer(self, layer: QuantizedLayer, x: str, y: str, name: str) -> Iterator[onnx.NodeProto]:
        assert layer.bias_scale is not None
        weight, bias = f"{name}/weight", f"{name}/bias"
        yield from self._weight(layer, name, weight)
        codes = self._constant(f"{bias}/codes", layer.bias.cpu().numpy())
        scale = self._constant(f"{bias}/scale", layer.bias_scale.cpu().numpy())
        yield helper.make_node("DequantizeLinear", [codes, scale], [bias], f"{bias}/dequantize", axis=0)
        if layer.geometry.kind == "convolution":
            yield convolution(layer.geometry, [x, weight, bias], y, name)
        elif self.ranks[name] == 2:
            yield helper.make_node("Gemm", [x, weight, bias], [y], name, transB=1)
        else:
            yield from self._folded_linear(layer, x, [weight, bias], y, name)

    def _weight_only(self, layer: QuantizedLayer, x: str, y: str, name: str) -> Iterator[onnx.NodeProto]:
        """A layer on float inputs; the weights of linear ones lie as (C_in, C_out).

        Products with 4-bit weights are fused to MatMulNBits, which reads packed codes at run time. All other weights become
        float32 when the file is loaded, by Cast and Mul: a DequantizeLinear would run each time.
        """
        linear = layer.geometry.kind == "linear"
        values, scale = layer.codes.cpu().numpy(), layer.scale.cpu().numpy()
        values = np.ascontiguousarray(values.T) if linear else values
        weight = f"{name}/weight"
        if linear and layer.bits == 4:
            operands = [self._stored(values, 4, name), self._constant(f"{name}/scale", scale)]
            yield helper.make_node("DequantizeLinear", operands, [weight], f"{weight}/dequantize", axis=1)
        else:
            codes = yield from self._codes(values, layer.bits, name)
            factor = self._constant(f"{name}/scale", scale if linear else scale.reshape(-1, *[1] * (values.ndim - 1)))
            yield helper.make_node("Cast", [codes], [f"{weight}/levels"], f"{weight}/levels", to=TensorProto.FLOAT)
            yield helper.make_node("Mul", [f"{weight}/levels", factor], [weight], f"{weight}/scale")
        bias = self._constant(f"{name}/bias", layer.bias.cpu().numpy())
        if not linear:
            yield convolution(layer.geometry, [x, weight, bias], y, name)
        elif self.ranks[name] == 2:
            yield helper.make_node("Gemm", [x, weight, bias], [y], name)
        else:
            yield helper.make_node("MatMul", [x, weight], [f"{name}/product"], name)
            yield helper.make_node("Add", [f"{name}/product", bias], [y], f"{name}/add")

    def _blocks(self, layer: QuantizedLayer, group: int, x: str, y: str, name: str) -> onnx.NodeProto:
        """A linear layer whose weights have a scale per group: ONNX Runtime's MatMulNBits, which decodes them as it multiplies.

        It has kernels for codes of 4 and of 8 bits; narrower ones are stored as these. Its sums are float32 ones
        (accuracy_level 1), not the int8 ones of ONNX Runtime's own quantizer.
        """
        outputs, inputs = layer.codes.shape
        bits = 4 if layer.bits <= 4 else 8
        codes = layer.codes.cpu().numpy().astype(np.int32) + (1 << (bits - 1))
        packed = _pack(codes, bits).reshape(outputs, inputs // group, group * bits // 8)
        stored = self._constant(f"{self._owner(packed, bits, name)}/codes", packed)
        operands = [x, stored, self._constant(f"{name}/scale", layer.scale.cpu().numpy()), "", ""]
        return helper.make_node(
            "MatMulNBits", [*operands, self._constant(f"{name}/bias", layer.bias.cpu().numpy())], [y], name,
            domain=MICROSOFT, K=inputs, N=outputs, bits=bits, block_size=group, accuracy_level=1,
        )  # fmt: skip

    def _weight(self, layer: QuantizedLayer, name: str, output: str) -> Iterator[onnx.NodeProto]:
        values = layer.codes.cpu().numpy()
        codes = yield from self._codes(values, layer.bits, name)
        # ONNX Runtime fuses Gemm only where the zero points are written out, and turns int8 weights into uint8 ones only
        # where they are and no other layer reads them
        zeros = self._constant(f"{name}/zero_point", np.zeros(len(values), dtype=np.int8))
        operands = [codes, self._constant(f"{name}/scale", layer.scale.cpu().numpy()), zeros]
        yield helper.make_node("DequantizeLinear", operands, [output], f"{name}/weight/dequantize", axis=0)

    def _codes(self, values: Array, bits: int, name: str) -> Generator[onnx.NodeProto, None, str]:
        """The nodes that decode these codes to int8; returns the value's name."""
        output = f"{name}/int8"
        if bits == 8:
            codes = self._stored(values, bits, name)
            owner = self._owner(values, bits, name)
            if owner != name:
                # ONNX Runtime converts a layer's codes to uint8 under one name, and fails where two layers read the same ones;
                # each copy is one of the copy before, because it merges nodes with the same operands
                shape = self._constant(f"shape/{values.shape}", np.array(values.shape))
                source = self._copies.get(owner, codes)
                yield helper.make_node("Reshape", [source, shape], [output], f"{name}/shared")
                codes = self._copies[owner] = output
            return codes
        if bits == 4:
            codes = self._stored(values, bits, name)
            yield helper.make_node("Cast", [codes], [output], f"{name}/unpack", to=TensorProto.INT8)
        else:
            yield from self._fields(values, bits, name, output)
        return output

    def _stored(self, values: Array, bits: int, name: str) -> str:
        """The tensor of these codes, of 4 or 8 bits; layers that share codes share it."""
        owner = self._owner(values, bits, name)
        if bits == 8:
            return self._packed(f"{owner}/codes", TensorProto.INT8, values.shape, values)
        return self._packed(f"{owner}/codes", TensorProto.INT4, values.shape, _pack(values, 4))

    def _owner(self, values: Array, bits: int, name: str) -> str:
        """The first layer with these codes."""
        key = repr((bits, values.shape)).encode() + values.tobytes()
        return self._by_content.setdefault(key, name)

    def _fields(self, values: Array, bits: int, name: str, output: str) -> Iterator[onnx.NodeProto]:
        """codes + 2^(bits - 1) as a sum of fields, each unpacked by Div and Mod on int32: runtimes agree on these."""
        whole = np.pad(values.astype(np.int32).reshape(-1) + (1 << (bits - 1)), (0, -values.size % 8))
        owner, total, rest = self._owner(values, bits, name), "", bits
        for width in FIELDS:  # nodes without names and short names of values: a layer's decoding takes a kilobyte
            if width > rest:
                continue
            rest -= width
            part = f"{name}/{rest}"
            packed = _pack((whole >> rest) & ((1 << width) - 1), width)
            stored = self._packed(f"{owner}/packed{rest}", TensorProto.UINT8, (len(packed), 1), packed)
            divisors = self._constant(f"divisors/{width}", (1 << np.arange(0, 8, width, dtype=np.int32))[None])
            flat = self._constant("flat", np.array([-1]))
            yield helper.make_node("Cast", [stored], [f"{part}i"], to=TensorProto.INT32)
            yield helper.make_node("Div", [f"{part}i", divisors], [f"{part}d"])
            yield helper.make_node("Mod", [f"{part}d", self._number(1 << width)], [f"{part}m"])
            yield helper.make_node("Reshape", [f"{part}m", flat], [value := f"{part}f"])
            if rest:
                yield helper.make_node("Mul", [value, self._number(1 << rest)], [f"{part}s"])
                value = f"{part}s"
            if total:
                yield helper.make_node("Add", [total, value], [f"{part}t"])
                value = f"{part}t"
            total = value
        signed = f"{name}/signed"
        yield helper.make_node("Sub", [total, self._number(1 << (bits - 1))], [signed])
        if whole.size > values.size:
            ends = [self._constant(f"end/{end}", np.array([end])) for end in (0, values.size)]
            yield helper.make_node("Slice", [signed, *ends], [f"{name}/cut"])
            signed = f"{name}/cut"
        shape = self._constant(f"shape/{values.shape}", np.array(values.shape))
        yield helper.make_node("Reshape", [signed, shape], [f"{name}/shaped"])
        yield helper.make_node("Cast", [f"{name}/shaped"], [output], to=TensorProto.INT8)

    def _number(self, value: int) -> str:
        return self._constant(f"int32/{value}", np.array(value, dtype=np.int32))

    def _packed(self, name: str, kind: int, shape: tuple[int, ...], values: Array) -> str:
        if name not in self.initializers:
            self.initializers[name] = helper.make_tensor(name, kind, shape, values.tobytes(), raw=True)
        return name

    def _folded_linear(
        self, layer: QuantizedLayer, x: str, weight_and_bias: list[str], y: str, name: str
    ) -> Iterator[onnx.NodeProto]:
        """Reshape, Gemm, Reshape; quantized once more behind the first, because fusions want the operand right there."""
        outputs, inputs = layer.codes.shape
        flat = f"{name}/flat"
        rows = self._constant(f"rows/{inputs}", np.array([-1, inputs], dtype=np.int64))
        yield helper.make_node("Reshape", [x, rows], [flat], f"{name}/flatten")
        grid = self._grids.get(x)
        if grid is not None:
            edge = next(edge for edge, quantizer in self.quantizers.items() if quantizer is grid)
            yield from self._quantize(flat, f"{flat}/on_grid", edge, grid.qmax)
            flat = f"{flat}/on_grid"
        product = f"{name}/product"
        yield helper.make_node("Gemm", [flat, *weight_and_bias], [product], name, transB=1)
        leading = [f"{name}/shape", f"{name}/leading", f"{name}/restored"]
        yield helper.make_node("Shape", [x], leading[:1], f"{name}/shape", end=-1)
        width = self._constant(f"width/{outputs}", np.array([outputs], dtype=np.int64))
        yield helper.make_node("Concat", [leading[0], width], leading[2:], f"{name}/restored", axis=0)
        yield helper.make_node("Reshape", [product, leading[2]], [y], f"{name}/restore")


def convolution(geometry: Geometry, inputs: list[str], y: str, name: str) -> onnx.NodeProto:
    return helper.make_node(
        "Conv",
        inputs,
        [y],
        name,
        strides=list(geometry.stride),
        pads=list(geometry.padding),
        dilations=list(geometry.dilation),
        group=geometry.groups,
    )


def _pack(values: Array, width: int) -> Array:
    """Codes of 1, 2, 4 or 8 bits in bytes, the first in the lowest bits, as ONNX stores INT4."""
    per = 8 // width
    low = (values.reshape(-1) & ((1 << width) - 1)).astype(np.uint8)
    low = np.pad(low, (0, -low.size % per)).reshape(-1, per)
    packed: Array = (low << np.arange(0, 8, width, dtype=np.uint8)).sum(1).astype(np.uint8)
    return packed
