"""ONNX nodes of quantizers and layers, by the rules that runtimes' fusions need (measured; see docs/howto/deploy.md).

uint8 activations with an integer Min below 8 bits, symmetric int8 weights per channel (4 bits packed as INT4 behind a Cast
that folds at load), int32 biases, linear layers as Reshape, Gemm, Reshape.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calque.errors import ExportError
from calque.export.lowering import DOMAIN, LAYER, QUANTIZE
from calque.graph import Geometry
from calque.model import QuantizedModel
from calque.quantizers import QuantizedLayer, Quantizer

Array = np.ndarray[Any, Any]

CONTAINER_MAX = 255  # of uint8, where runtimes saturate
WEIGHT_BITS = (4, 8)


class Expander:
    """Rewrites one exported graph, replacing calque's named operators by standard nodes."""

    def __init__(self, model: QuantizedModel, ranks: dict[str, int]):
        self.layers = model.layers
        self.quantizers = model.quantizers
        self.ranks = ranks
        self.initializers: dict[str, TensorProto] = {}
        self._by_content: dict[bytes, str] = {}
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
                assert node.op_type == LAYER
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
        weight, bias = f"{name}/weight", f"{name}/bias"
        yield from self._weight(layer, name, weight)
        if layer.bias_scale is None:
            self._constant(bias, layer.bias.cpu().numpy())
        else:
            codes = self._constant(f"{bias}/codes", layer.bias.cpu().numpy())
            scale = self._constant(f"{bias}/scale", layer.bias_scale.cpu().numpy())
            yield helper.make_node("DequantizeLinear", [codes, scale], [bias], f"{bias}/dequantize", axis=0)
        if layer.geometry.kind == "convolution":
            yield _convolution(layer.geometry, [x, weight, bias], y, name)
        elif self.ranks[name] == 2:
            yield helper.make_node("Gemm", [x, weight, bias], [y], name, transB=1)
        else:
            yield from self._folded_linear(layer, x, [weight, bias], y, name)

    def _weight(self, layer: QuantizedLayer, name: str, output: str) -> Iterator[onnx.NodeProto]:
        if layer.bits not in WEIGHT_BITS:
            raise ExportError(
                f"layer {name}: ONNX files carry weights of {WEIGHT_BITS[0]} and {WEIGHT_BITS[1]} bits. Got {layer.bits}. "
                "Give the layer one of these, with override or a plan."
            )
        values = layer.codes.cpu().numpy()
        codes = self._codes(values, layer.bits, f"{name}/codes")
        if layer.bits < 8:
            yield helper.make_node("Cast", [codes], [f"{name}/int8"], f"{name}/unpack", to=TensorProto.INT8)
            codes = f"{name}/int8"
        # ONNX Runtime fuses Gemm only where the zero points are written out, and turns int8 weights into uint8 ones only
        # where they are and no other layer reads them
        zeros = self._constant(f"{name}/zero_point", np.zeros(len(values), dtype=np.int8))
        operands = [codes, self._constant(f"{name}/scale", layer.scale.cpu().numpy()), zeros]
        yield helper.make_node("DequantizeLinear", operands, [output], f"{name}/weight/dequantize", axis=0)

    def _codes(self, values: Array, bits: int, name: str) -> str:
        """The initializer of these codes; layers that share codes share it."""
        key = repr((bits, values.shape)).encode() + values.tobytes()
        if key not in self._by_content:
            self._by_content[key] = name
            kind = TensorProto.INT8 if bits == 8 else TensorProto.INT4
            packed = values.reshape(-1).view(np.uint8) if bits == 8 else _pack_int4(values)
            self.initializers[name] = helper.make_tensor(name, kind, values.shape, packed.tobytes(), raw=True)
        return self._by_content[key]

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


def _convolution(geometry: Geometry, inputs: list[str], y: str, name: str) -> onnx.NodeProto:
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


def _pack_int4(values: Array) -> Array:
    """Two codes a byte, the first in the low half, as ONNX stores INT4."""
    nibbles = (values.reshape(-1) & 0xF).astype(np.uint8)
    nibbles = np.pad(nibbles, (0, nibbles.size % 2))
    return nibbles[0::2] | (nibbles[1::2] << 4)
