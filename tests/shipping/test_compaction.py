"""An exported file without what it need not have: equal constants, constant operators, names that nobody reads."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import calque
import networks
from calque.shipping import compaction
from calque.shipping.decoding import Array, Decoder
from calque.shipping.verify import run_onnx

SEQUENCE, WIDTH = 24, 8


class Attention(nn.Module):
    """One head with a causal mask of its own, as 0 and 1 in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.tril(torch.ones(SEQUENCE, SEQUENCE)))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) / WIDTH**0.5).masked_fill(self.mask == 0, float("-inf"))
        result: Tensor = x + self.out(scores.softmax(-1) @ value)
        return result


def test_equal_masks_of_blocks_are_one_constant_of_booleans(tmp_path: Path) -> None:
    net = networks.seeded(nn.Sequential(Attention(), Attention(), Attention()))
    for block in net.children():
        block.mask.copy_(torch.tril(torch.ones(SEQUENCE, SEQUENCE)))  # type: ignore[operator]  # a buffer
    inputs = torch.randn(40, SEQUENCE, WIDTH, generator=torch.Generator().manual_seed(0))
    q = calque.quantize(net, inputs, recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    proto = onnx.load(path)
    masks = [tensor for tensor in proto.graph.initializer if list(tensor.dims) == [SEQUENCE, SEQUENCE]]
    assert [tensor.data_type for tensor in masks] == [TensorProto.BOOL]
    assert calque.verify(path, q, inputs).optimized.exact >= 0.99


def test_nodes_of_two_bit_layers_are_few_and_only_layers_have_names(
    tmp_path: Path, trained: nn.Module, calibration: Tensor
) -> None:
    q = calque.quantize(trained, calibration, bits="w2a4", recipe="nearest", first_last=None)
    proto = onnx.load(calque.export_onnx(q, tmp_path / "model.onnx"))

    assert {node.name for node in proto.graph.node} == {"", *q.layers}
    assert sum(node.ByteSize() for node in proto.graph.node) < 700 * len(q.layers)
    named = {tensor.name for tensor in proto.graph.initializer}
    assert {f"{layer}/{part}" for layer in q.layers for part in ("scale", "bias/codes", "packed0")} <= named
    values = {name for node in proto.graph.node for name in node.output}
    assert {f"{edge}/codes" for edge in q.quantizers} <= values


def test_a_linear_layer_on_tokens_of_free_number_keeps_both_axes_free(tmp_path: Path) -> None:
    net = networks.seeded(
        nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    )
    inputs = torch.randn(40, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    q = calque.quantize(net, inputs, recipe="nearest", dynamic={"input": {1: torch.export.Dim.AUTO}})
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    longer = torch.randn(3, 11, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run_onnx(path, [longer]), q.integer()(longer), rtol=0, atol=0)
    assert [node.op_type for node in onnx.load(path).graph.node].count("Shape") == 2  # one for each width


def graph_of(nodes: list[onnx.NodeProto], constants: dict[str, Array]) -> onnx.ModelProto:
    """A model with the input x and the output y, both float32 vectors."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy")
    initializers = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "test", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_a_constant_is_computed_where_it_is_no_larger_than_its_source() -> None:
    proto = graph_of(
        [
            helper.make_node("Equal", ["mask", "zero"], ["where"]),
            helper.make_node("RandomNormal", [], ["noise"], shape=[4]),
            helper.make_node("Where", ["where", "one", "x"], ["kept"]),
            helper.make_node("Add", ["kept", "noise"], ["y"]),
        ],
        {
            "mask": np.array([0, 1, 0, 1], np.float32),
            "zero": np.zeros(1, np.float32),
            "one": np.ones(1, np.float32),
        },
    )

    compaction.fold_constants(proto)
    compaction.drop_unread(proto.graph)

    assert [node.op_type for node in proto.graph.node] == ["RandomNormal", "Where", "Add"]
    folded = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    np.testing.assert_array_equal(folded["where"], [True, False, True, False])
    assert "mask" not in folded


def test_a_large_expansion_stays_an_operator() -> None:
    nodes = [helper.make_node("Expand", ["one", "shape"], ["many"]), helper.make_node("Add", ["x", "many"], ["y"])]
    proto = graph_of(nodes, {"one": np.ones(1, np.float32), "shape": np.array([1000])})

    compaction.fold_constants(proto)

    assert [node.op_type for node in proto.graph.node] == ["Expand", "Add"]


def test_equal_constants_are_shared_but_codes_of_layers_and_names_that_are_kept() -> None:
    nodes = [
        helper.make_node("Add", ["x", "a"], ["u"]),
        helper.make_node("Add", ["u", "b"], ["v"]),
        helper.make_node("Add", ["v", "kept"], ["w"]),
        helper.make_node("Cast", ["codes"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["others"], ["d"], to=TensorProto.FLOAT),
        helper.make_node("Sum", ["w", "c", "d"], ["y"]),
    ]
    same, codes = np.full(2, 3, np.float32), np.full(2, 3, np.int8)
    proto = graph_of(nodes, {"a": same, "b": same, "kept": same, "codes": codes, "others": codes})

    compaction.share_constants(proto.graph, {"kept"}.__contains__)
    compaction.shorten(proto.graph, {"kept"}.__contains__)

    onnx.checker.check_model(proto)
    assert len(proto.graph.initializer) == 4
    assert "kept" in {tensor.name for tensor in proto.graph.initializer}
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros(2, np.float32)})[0], np.full(2, 15.0))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(3, 5), (8, 2, 3, 3)])
def test_packed_codes_are_decoded_as_they_were(bits: int, shape: tuple[int, ...]) -> None:
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    values = np.random.default_rng(bits).integers(low, high, shape, dtype=np.int8)
    values.reshape(-1)[:2] = low, high - 1
    decoder, nodes = Decoder(), []
    walk = decoder.codes(values, bits, "layer")
    try:
        while True:
            nodes.append(next(walk))
    except StopIteration as stop:
        output = stop.value
    nodes.append(helper.make_node("Identity", [output], ["y"]))
    y = helper.make_tensor_value_info("y", TensorProto.INT8, None)
    graph = helper.make_graph(nodes, "test", [], [y], list(decoder.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    np.testing.assert_array_equal(session.run(None, {})[0], values)
