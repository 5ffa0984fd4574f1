"""ONNX nodes of quantizers and layers, by the rules that runtimes' fusions need (measured; see docs/howto/deploy.md).

uint8 activations with an integer Min below 8 bits, symmetric int8 weights per channel (4 bits packed as INT4 behind a Cast,
other widths as packed fields behind a table, all of which fold at load), int32 biases, linear layers as Reshape, Gemm, Reshape;
MatMulNBits where groups of weights have scales of their own.
"""

from collections.abc import Generator, Iterator

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from calque.network import Geometry
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.shipping.decoding import Array, Decoder, pack
from calque.shipping.lowering import DOMAIN, LAYER, QUANTIZE, TABLE

Shape = tuple[int | str, ...]  # free axes by their symbols

CONTAINER_MAX = 255  # of uint8, where runtimes saturate
MOVED = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")  # leave a value on its grid
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


class Expander:
    """Rewrites one exported graph, replacing calque's named operators by standard nodes.

    Nodes have no names but those of layers, and names of values are short: a few thousand nodes would be a tenth of the file.
    """

    def __init__(self, model: QuantizedModel, shapes: dict[str, Shape]):
        self.layers = model.layers
        self.quantizers = model.quantizers
        self.shapes = shapes
        self.decoder = Decoder()
        self._calls: dict[str, int] = {}
        self._grids: dict[str, Quantizer] = {}  # value name -> the grid it is on
        self._again: dict[str, str] = {}  # value that was put on its grid once more -> the value before
        self._shapes: dict[Shape, str] = {}  # of a layer's output -> the value that holds it

    def expand(self, graph: onnx.GraphProto) -> None:
        """Replaces the nodes of `graph`, in place, and adds their constants."""
        nodes = []
        for node in graph.node:
            if node.domain != DOMAIN:
                nodes.append(node)
                if node.op_type in MOVED and node.input[0] in self._grids:
                    self._grids[node.output[0]] = self._grids[node.input[0]]
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
        graph.initializer.extend(self.decoder.initializers.values())

    def _constant(self, name: str, values: Array) -> str:
        return self.decoder.constant(name, values)

    def _quantize(self, x: str, y: str, edge: str, highest: int) -> Iterator[onnx.NodeProto]:
        call = self._calls[edge] = self._calls.get(edge, 0) + 1
        name = edge if call == 1 else f"{edge}#{call}"
        grid = self.quantizers[edge]
        if self._grids.get(x) is grid:
            self._again[y] = x
        self._grids[y] = grid
        scale = self._constant(f"{edge}/scale", grid.scale.cpu().numpy())
        zero = self._constant(f"zero_point/{int(grid.zero_point)}", grid.zero_point.cpu().numpy().astype(np.uint8))
        codes = f"{name}/codes"
        raw = codes if highest == CONTAINER_MAX else f"{name}/unclipped"
        yield helper.make_node("QuantizeLinear", [x, scale, zero], [raw])
        if highest != CONTAINER_MAX:
            limit = self._constant(f"limit/{highest}", np.array(highest, dtype=np.uint8))
            yield helper.make_node("Min", [raw, limit], [codes])
        yield helper.make_node("DequantizeLinear", [codes, scale, zero], [y])

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
        codes = yield from self.decoder.codes(layer.codes.cpu().numpy(), layer.bits, name)
        scales = self._constant(f"{name}/scale", layer.scale.cpu().numpy()[:, None])
        found, scale = f"{name}/rows", f"{name}/row_scales"
        yield helper.make_node("Gather", [codes, x], [found])
        yield helper.make_node("Gather", [scales, x], [scale])
        yield helper.make_node("Cast", [found], [f"{name}/levels"], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{name}/levels", scale], [y], name)

    def _integer(self, layer: QuantizedLayer, x: str, y: str, name: str) -> Iterator[onnx.NodeProto]:
        assert layer.bias_scale is not None
        weight, bias = f"{name}/weight", f"{name}/added"
        yield from self._weight(layer, name, weight)
        codes = self._constant(f"{name}/bias/codes", layer.bias.cpu().numpy())
        scale = yield from self._bias_scale(layer, x, name)
        yield helper.make_node("DequantizeLinear", [codes, scale], [bias], axis=0)
        if layer.geometry.kind == "convolution":
            yield convolution(layer.geometry, [x, weight, bias], y, name)
        elif len(self.shapes[name]) == 2:
            yield helper.make_node("Gemm", [x, weight, bias], [y], name, transB=1)
        else:
            yield from self._folded_linear(layer, x, [weight, bias], y, name)

    def _bias_scale(self, layer: QuantizedLayer, x: str, name: str) -> Generator[onnx.NodeProto, None, str]:
        """s_x s_w, computed at load; stored only where it was rounded otherwise."""
        assert layer.bias_scale is not None
        scale = f"{name}/accumulator"
        grid = self._grids.get(x)
        if grid is None or not torch.equal(grid.scale * layer.scale, layer.bias_scale):
            return self._constant(f"{name}/bias/scale", layer.bias_scale.cpu().numpy())
        yield helper.make_node("Mul", [f"{self._edge(grid)}/scale", f"{name}/scale"], [scale])
        return scale

    def _edge(self, grid: Quantizer) -> str:
        return next(edge for edge, quantizer in self.quantizers.items() if quantizer is grid)

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
            operands = [self.decoder.stored(values, 4, name), self._constant(f"{name}/scale", scale)]
            yield helper.make_node("DequantizeLinear", operands, [weight], axis=1)
        else:
            codes = yield from self.decoder.codes(values, layer.bits, name)
            factor = self._constant(f"{name}/scale", scale if linear else scale.reshape(-1, *[1] * (values.ndim - 1)))
            yield helper.make_node("Cast", [codes], [f"{weight}/levels"], to=TensorProto.FLOAT)
            yield helper.make_node("Mul", [f"{weight}/levels", factor], [weight])
        bias = self._constant(f"{name}/bias", layer.bias.cpu().numpy())
        if not linear:
            yield convolution(layer.geometry, [x, weight, bias], y, name)
        elif len(self.shapes[name]) == 2:
            yield helper.make_node("Gemm", [x, weight, bias], [y], name)
        else:
            yield helper.make_node("MatMul", [x, weight], [f"{name}/product"], name)
            yield helper.make_node("Add", [f"{name}/product", bias], [y])

    def _blocks(self, layer: QuantizedLayer, group: int, x: str, y: str, name: str) -> onnx.NodeProto:
        """A linear layer whose weights have a scale per group: ONNX Runtime's MatMulNBits, which decodes them as it multiplies.

        It has kernels for codes of 4 and of 8 bits; narrower ones are stored as these. Its sums are float32 ones
        (accuracy_level 1), not the int8 ones of ONNX Runtime's own quantizer.
        """
        outputs, inputs = layer.codes.shape
        bits = 4 if layer.bits <= 4 else 8
        codes = layer.codes.cpu().numpy().astype(np.int32) + (1 << (bits - 1))
        packed = pack(codes, bits).reshape(outputs, inputs // group, group * bits // 8)
        stored = self._constant(f"{self.decoder.owner(packed, bits, name)}/codes", packed)
        operands = [x, stored, self._constant(f"{name}/scale", layer.scale.cpu().numpy()), "", ""]
        return helper.make_node(
            "MatMulNBits", [*operands, self._constant(f"{name}/bias", layer.bias.cpu().numpy())], [y], name,
            domain=MICROSOFT, K=inputs, N=outputs, bits=bits, block_size=group, accuracy_level=1,
        )  # fmt: skip

    def _weight(self, layer: QuantizedLayer, name: str, output: str) -> Iterator[onnx.NodeProto]:
        values = layer.codes.cpu().numpy()
        codes = yield from self.decoder.codes(values, layer.bits, name)
        # ONNX Runtime fuses Gemm only where the zero points are written out, and turns int8 weights into uint8 ones only
        # where they are and no other layer reads them
        zeros = self._constant(f"{name}/zero_point", np.zeros(len(values), dtype=np.int8))
        operands = [codes, self._constant(f"{name}/scale", layer.scale.cpu().numpy()), zeros]
        yield helper.make_node("DequantizeLinear", operands, [output], axis=0)

    def _folded_linear(
        self, layer: QuantizedLayer, x: str, weight_and_bias: list[str], y: str, name: str
    ) -> Iterator[onnx.NodeProto]:
        """Reshape, Gemm, Reshape; quantized once more behind the first, because fusions want the operand right there."""
        inputs = layer.codes.shape[1]
        flat = f"{name}/flat"
        rows = self._constant(f"rows/{inputs}", np.array([-1, inputs], dtype=np.int64))
        grid = self._grids.get(x)
        x = self._again.get(x, x)
        yield helper.make_node("Reshape", [x, rows], [flat])
        if grid is not None:
            yield from self._quantize(flat, f"{flat}/on_grid", self._edge(grid), grid.qmax)
            flat = f"{flat}/on_grid"
        product = f"{name}/product"
        yield helper.make_node("Gemm", [flat, *weight_and_bias], [product], name, transB=1)
        shape = yield from self._shape(x, name)
        yield helper.make_node("Reshape", [product, shape], [y])

    def _shape(self, x: str, name: str) -> Generator[onnx.NodeProto, None, str]:
        """The shape of a linear layer's output: a constant where one axis is free, else read from the input, once for all."""
        shape = self.shapes[name]
        numbers = [size if isinstance(size, int) else -1 for size in shape]
        if numbers.count(-1) <= 1:
            return self._constant(f"shape/{tuple(numbers)}", np.array(numbers, dtype=np.int64))
        if shape not in self._shapes:
            self._shapes[shape] = f"{name}/shape"
            width = self._constant(f"shape/{tuple(numbers[-1:])}", np.array(numbers[-1:], dtype=np.int64))
            yield helper.make_node("Shape", [x], [f"{name}/leading"], end=-1)
            yield helper.make_node("Concat", [f"{name}/leading", width], [f"{name}/shape"], axis=0)
        return self._shapes[shape]


def convolution(geometry: Geometry, inputs: list[str], y: str, name: str) -> onnx.NodeProto:
    """A Conv whose attributes are written where they are not ONNX's defaults."""
    node = helper.make_node("Conv", inputs, [y], name)
    given = {"strides": geometry.stride, "pads": geometry.padding, "dilations": geometry.dilation}
    usual = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
    for key, value in given.items():
        if tuple(value) != usual[key]:
            node.attribute.append(helper.make_attribute(key, list(value)))
    if geometry.groups != 1:
        node.attribute.append(helper.make_attribute("group", geometry.groups))
    return node
