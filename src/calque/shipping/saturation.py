"""Whether a runtime's integer products saturate on this processor: it is asked, by one convolution."""

from functools import cache

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from calque.shipping.runtimes import DEFAULT, OnnxRuntime, Target, open_runtime


@cache
def saturates(target: Target) -> bool:
    """Whether this runtime, as it is by default, saturates sums of uint8 x int8 products on this processor.

    A convolution of four products of 255 x 127 tells: x86 processors without VNNI stop each pair at 32767.
    """
    weights = np.full((1, 4, 1, 1), 127, dtype=np.int8)
    constants = {
        "one": np.float32(1), "zero": np.uint8(0), "w": weights, "ones": np.ones(1, np.float32),
        "zeros": np.zeros(1, np.int8), "step": np.float32(4 * 127),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ones", "zeros"], ["v"], axis=0),
        helper.make_node("Conv", ["d", "v"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "step", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "step", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "probe", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    runtime = OnnxRuntime(proto, settings=DEFAULT) if target == "onnxruntime" else open_runtime(proto, target)
    received = runtime.run([torch.full((1, 4, 8, 8), 255.0)])[0]
    return bool((received < 0.99 * 255 * 4 * 127).any())
