"""One layer alone as an ONNX file, for its time: in form what the exported network holds, with weights of ones.

What stands around the layer in the network decides what is its own work: codes that an integer kernel made come in as codes,
real numbers are quantized by the file, and so on. Weights of every width are int8 once a file is loaded, so they are here.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calque.network import Geometry
from calque.shipping.nodes import MICROSOFT, convolution

OPSET, IR_VERSION = 21, 10
NARROW = 15  # a bound of codes below 8 bits; which one does not matter to the clock

Form = Literal["integer", "float", "fused", "grouped"]


@dataclass(frozen=True, slots=True)
class Alone:
    """A layer and what its work is; equal ones take the same time.

    Attributes:
        geometry, weight, x: the layer, the shape of its weight, and that of its input, rows of the batch first.
        form: "integer": on codes.  "float": on real numbers, its weights decoded at load.  "fused", "grouped": on real
            numbers with packed weights, fused by ONNX Runtime or written as its own operator.
        bits, group: of packed weights; 0 for all other forms.
        codes: whether the input comes as codes, from an integer kernel.
        again: whether these are put on a grid of the layer's own, because others read them, too.
        narrow: whether codes below 8 bits are bounded in front of the layer.
        result: whether the result becomes codes.
    """

    geometry: Geometry
    weight: tuple[int, ...]
    x: tuple[int, ...]
    form: Form
    bits: int = 0
    group: int = 0
    codes: bool = False
    again: bool = False
    narrow: bool = False
    result: bool = False


def write_alone(case: Alone) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """The file, and an input for it."""
    return _Writer(case).write()


class _Writer:
    def __init__(self, case: Alone):
        self.case = case
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.step = 1.0  # of the last grid

    def write(self) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
        case = self.case
        flat = case.geometry.kind == "linear"  # the network reshapes codes, which costs nothing
        shape = (int(np.prod(case.x[:-1])), case.x[-1]) if flat else case.x
        table = case.geometry.kind == "embedding"
        kind, given = (np.dtype(np.int64), 0) if table else (np.dtype(np.uint8 if case.codes else np.float32), 1)
        value = "x"
        if case.form == "integer" and not table:
            value = self._on_grid(value)
        y = self._layer(value)
        if case.result:
            y = self._quantize(y, narrow=False)
        graph = helper.make_graph(
            self.nodes, "alone",
            [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(kind), shape)],
            [helper.make_tensor_value_info(y, TensorProto.UINT8 if case.result else TensorProto.FLOAT, None)],
            list(self.constants.values()),
        )  # fmt: skip
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        proto = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION)
        return proto, {"x": np.full(shape, given, dtype=kind)}

    def _on_grid(self, x: str) -> str:
        """The layer's input in real units, on its grid."""
        if not self.case.codes:
            return self._dequantize(self._quantize(x, narrow=self.case.narrow))
        if self.case.again:
            return self._dequantize(self._quantize(self._dequantize(x), narrow=self.case.narrow))
        return self._dequantize(self._bounded(x) if self.case.narrow else x)

    def _layer(self, x: str) -> str:
        case = self.case
        outputs, bias = case.weight[0], self._constant("bias", np.ones(case.weight[0], np.float32))
        if case.geometry.kind == "embedding":
            return self._table(x)
        if case.form == "grouped":
            width = case.weight[1] // case.group
            packed = self._constant("codes", np.ones((outputs, width, case.group * case.bits // 8), np.uint8))
            scale = self._constant("scale", np.ones((outputs, width), np.float32))
            options = {"K": case.weight[1], "N": outputs, "bits": case.bits, "block_size": case.group}
            return self._add(
                "MatMulNBits", [x, packed, scale, "", "", bias], domain=MICROSOFT, accuracy_level=1, **options
            )
        weight = self._weight()
        if case.form == "integer":
            # a bias in other units than s_x s_w, here s_x, would keep ONNX Runtime from fusing
            steps = self._constant("steps", np.full(outputs, self.step, np.float32))
            bias = self._add("DequantizeLinear", [self._constant("biases", np.ones(outputs, np.int32)), steps], axis=0)
        if case.geometry.kind == "convolution":
            self.nodes.append(convolution(case.geometry, [x, weight, bias], "y", "layer"))
            return "y"
        return self._add("Gemm", [x, weight, bias], transB=int(case.form == "integer"))

    def _weight(self) -> str:
        """In real units; of a linear layer on real numbers (C_in, C_out)."""
        case = self.case
        if case.form == "integer":
            codes = self._constant("codes", np.ones(case.weight, np.int8))
            zeros = self._constant("zeros", np.zeros(case.weight[0], np.int8))
            scale = self._constant("scale", np.ones(case.weight[0], np.float32))
            return self._add("DequantizeLinear", [codes, scale, zeros], axis=0)
        shape = case.weight[::-1] if case.geometry.kind == "linear" else case.weight
        if case.form == "float":
            return self._constant("weight", np.ones(shape, np.float32))
        packed = np.full(-(-int(np.prod(shape)) // 2), 0x11, np.uint8)
        self.constants["codes"] = helper.make_tensor("codes", TensorProto.INT4, shape, packed.tobytes(), raw=True)
        # another value than the bias's: ONNX Runtime merges small constants, and would not fuse then
        scale = self._constant("scale", np.full(case.weight[0], 0.5, np.float32))
        return self._add("DequantizeLinear", ["codes", scale], axis=1)

    def _table(self, x: str) -> str:
        if self.case.form == "float":
            return self._add("Gather", [self._constant("weight", np.ones(self.case.weight, np.float32)), x])
        found = self._add("Gather", [self._constant("codes", np.ones(self.case.weight, np.int8)), x])
        scale = self._add("Gather", [self._constant("scale", np.ones((self.case.weight[0], 1), np.float32)), x])
        return self._add("Mul", [self._add("Cast", [found], to=TensorProto.FLOAT), scale])

    def _quantize(self, x: str, *, narrow: bool) -> str:
        codes = self._add("QuantizeLinear", [x, *self._grid()])
        return self._bounded(codes) if narrow else codes

    def _bounded(self, codes: str) -> str:
        return self._add("Min", [codes, self._constant("limit", np.array(NARROW, np.uint8))])

    def _dequantize(self, codes: str) -> str:
        return self._add("DequantizeLinear", [codes, *self._grid()])

    def _grid(self) -> list[str]:
        """One step and zero for each grid, so that none is another's."""
        number = len(self.nodes)
        self.step = 1 + 2.0**-number
        return [
            self._constant(f"step{number}", np.array(self.step, np.float32)),
            self._constant("zero", np.array(0, np.uint8)),
        ]

    def _add(self, operator: str, inputs: list[str], **options: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **options))
        return output

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(values), name)
        return name
