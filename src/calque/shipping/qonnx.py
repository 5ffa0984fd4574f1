"""A quantized network as QONNX: one Quant node per tensor on real numbers, of any bits, for FPGA flows.

Source: Pappalardo et al. 2022 (arXiv 2206.07527).
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper

from calque.quantized.modules import QuantizedLayer
from calque.shipping.decoding import Array
from calque.shipping.nodes import Expander, convolution

QONNX_DOMAIN = "qonnx.custom_op.general"
BIAS_BITS = 32


class QuantExpander(Expander):
    """Replaces calque's named operators by Quant nodes and float operators."""

    def _quantize(self, x: str, y: str, edge: str, highest: int) -> Iterator[onnx.NodeProto]:
        call = self._calls[edge] = self._calls.get(edge, 0) + 1
        grid = self.quantizers[edge]
        scale = self._constant(f"{edge}/scale", grid.scale.cpu().numpy())
        zero = self._constant(f"{edge}/zero_point", grid.zero_point.cpu().numpy().astype(np.float32))
        yield self._quant(x, y, (scale, zero), highest.bit_length(), edge if call == 1 else f"{edge}#{call}", signed=0)

    def _layer(self, x: str, y: str, name: str) -> Iterator[onnx.NodeProto]:
        layer = self.layers[name]
        linear = layer.geometry.kind == "linear"
        weight, bias = f"{name}/weight", f"{name}/bias"
        codes, scale = layer.codes.cpu().numpy(), layer.scale.cpu().numpy()
        codes, scale = (codes.T, scale.T) if linear else (codes, scale.reshape(-1, *[1] * (codes.ndim - 1)))
        if layer.group is None:
            yield from self._weights(codes, scale, layer, weight)
        else:
            apart = f"{weight}/apart"
            yield from self._weights(codes.reshape(-1, layer.group, codes.shape[1]), scale[:, None], layer, apart)
            shape = self._constant(f"shape/{codes.shape}", np.array(codes.shape))
            yield helper.make_node("Reshape", [apart, shape], [weight], f"{weight}/joined")
        if layer.geometry.kind == "embedding":
            yield helper.make_node("Gather", [weight, x], [y], name, axis=0)
            return
        yield from self._bias(layer, bias)
        if linear:
            yield helper.make_node("MatMul", [x, weight], [f"{name}/product"], name)
            yield helper.make_node("Add", [f"{name}/product", bias], [y], f"{name}/add")
        else:
            yield convolution(layer.geometry, [x, weight, bias], y, name)

    def _weights(self, codes: Array, scale: Array, layer: QuantizedLayer, weight: str) -> Iterator[onnx.NodeProto]:
        real = self._constant(f"{weight}/real", np.ascontiguousarray(codes * scale, dtype=np.float32))
        grid = (self._constant(f"{weight}/scale", scale), self._constant("zero", np.array(0, np.float32)))
        yield self._quant(real, weight, grid, layer.bits, f"{weight}/quantize", signed=1)

    def _bias(self, layer: QuantizedLayer, bias: str) -> Iterator[onnx.NodeProto]:
        real = layer.real_bias.cpu().numpy().astype(np.float32)
        if layer.bias_scale is None:
            self._constant(bias, real)
            return
        grid = (
            self._constant(f"{bias}/scale", layer.bias_scale.cpu().numpy()),
            self._constant("zero", np.array(0, np.float32)),
        )
        yield self._quant(self._constant(f"{bias}/real", real), bias, grid, BIAS_BITS, f"{bias}/quantize", signed=1)

    def _quant(self, x: str, y: str, grid: tuple[str, str], bits: int, name: str, *, signed: int) -> onnx.NodeProto:
        width = self._constant(f"bits/{bits}", np.array(bits, np.float32))
        return helper.make_node(
            "Quant", [x, *grid, width], [y], name, domain=QONNX_DOMAIN, signed=signed, narrow=0, rounding_mode="ROUND"
        )
