"""Exported files in ONNX Runtime, OpenVINO and QONNX's executor: agreement, latency, notes, and what a bound refuses."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import calque
import networks
from calque.errors import MissingExtraError, SpecError, VerificationError
from calque.quantized.model import QuantizedModel
from calque.shipping.runtimes import DEFAULT, OnnxRuntime, Target, _reads, open_runtime
from calque.shipping.saturation import saturates
from calque.shipping.verify import count_kernels, load_proto, run_onnx
from networks import Exported

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="the extra openvino is not installed")
needs_qonnx = pytest.mark.skipif(find_spec("qonnx") is None, reason="the extra qonnx is not installed")
TARGETS = ["onnxruntime", pytest.param("openvino", marks=needs_openvino), pytest.param("qonnx", marks=needs_qonnx)]


@pytest.fixture(scope="module")
def made(exported: Exported) -> tuple[QuantizedModel, Path]:
    return exported(bits="w4a8", first_last="w7a8")


@pytest.fixture(scope="module")
def q(made: tuple[QuantizedModel, Path]) -> QuantizedModel:
    return made[0]


@pytest.fixture(scope="module")
def path(made: tuple[QuantizedModel, Path]) -> Path:
    """The file of q for ONNX Runtime and OpenVINO."""
    return made[1]


@pytest.mark.parametrize("target", TARGETS)
def test_every_runtime_agrees_with_the_exact_evaluation(
    tmp_path: Path, q: QuantizedModel, test_inputs: Tensor, target: Target
) -> None:
    path = calque.export_onnx(q, tmp_path / "model.onnx", target=target)

    result = calque.verify(path, q, test_inputs, target=target)

    assert result.target == target
    assert result.optimized.exact >= 0.99
    assert result.outside.exact >= 0.97
    assert (result.plain is None) == (target != "onnxruntime")
    assert result.ideal_bytes == q.report.size


@needs_openvino
def test_openvino_reads_the_file_of_onnx_runtime_and_runs_its_layers_on_integers(
    tmp_path: Path, q: QuantizedModel, path: Path
) -> None:
    same = calque.export_onnx(q, tmp_path / "same.onnx", target="openvino")

    integer, floats, _ = count_kernels(path, "openvino")

    assert path.read_bytes() == same.read_bytes()
    assert integer["Convolution"] == 4
    assert integer["FullyConnected"] == 1
    assert not floats


@needs_qonnx
def test_a_qonnx_file_has_one_quant_node_per_tensor_with_its_bits(tmp_path: Path, q: QuantizedModel) -> None:
    graph = onnx.load(calque.export_onnx(q, tmp_path / "model.onnx", target="qonnx")).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    bits = {node.output[0]: int(constants[node.input[3]]) for node in graph.node if node.op_type == "Quant"}

    assert {node.op_type for node in graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    for name, layer in q.layers.items():
        assert bits[f"{name}/weight"] == layer.bits
        assert bits[f"{name}/bias"] == 32
    assert len(bits) == 2 * len(q.layers) + sum(
        node.op == "call_module" and str(node.target) not in q.layers for node in q.graph_module.graph.nodes
    )


@pytest.mark.parametrize("target", TARGETS[:2])
def test_latency_is_measured_beside_the_float_network_that_is_left_as_it_was(
    q: QuantizedModel, trained: nn.Module, test_inputs: Tensor, target: Target, path: Path
) -> None:
    trained.train()
    try:
        latency = calque.verify(path, q, test_inputs, target=target, original=trained).latency
        assert trained.training
    finally:
        trained.eval()

    assert latency is not None
    assert latency.ratio == latency.milliseconds / latency.float_milliseconds
    assert min(latency.milliseconds, latency.float_milliseconds, latency.load_seconds, latency.float_load_seconds) > 0
    assert latency.runs >= 3
    assert f"default sessions, {latency.runs} runs in turns" in str(latency)
    assert (latency.exact_milliseconds, latency.exact_ratio, latency.exact_settings) == (None, None, ())  # 7-bit ends


def test_agreement_below_the_bound_is_an_error_with_all_figures(
    tmp_path: Path, calibration: Tensor, test_inputs: Tensor, q: QuantizedModel
) -> None:
    other = calque.quantize(networks.seeded(networks.Residual(), 1), calibration, bits="w8a8", recipe="nearest")
    path = calque.export_onnx(other, tmp_path / "model.onnx")
    unnamed = onnx.load(path)
    del unnamed.metadata_props[:]  # else it would be refused before it runs
    onnx.save(unnamed, path)

    with pytest.raises(
        VerificationError, match=r"of 256 rows agree, less than the bound of 99\.90%.* dB.* of the codes of .* differ"
    ) as caught:
        calque.verify(path, q, test_inputs, bound=0.999)

    found = caught.value.verification
    assert isinstance(found, calque.Verification)
    assert found.optimized.exact < 0.999
    assert calque.verify(path, q, test_inputs, bound=0).optimized == found.optimized


@pytest.mark.parametrize("bound", [-0.1, 1.1, float("nan")])
def test_a_bound_is_a_share(q: QuantizedModel, test_inputs: Tensor, bound: float, path: Path) -> None:
    with pytest.raises(SpecError, match="bound is a share"):
        calque.verify(path, q, test_inputs, bound=bound)


def test_an_unknown_target_is_refused(tmp_path: Path, q: QuantizedModel, test_inputs: Tensor, path: Path) -> None:
    with pytest.raises(SpecError, match=r"target is one of onnxruntime, openvino, qonnx\. Got 'coreml'"):
        calque.export_onnx(q, tmp_path / "model.onnx", target="coreml")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="target is one of"):
        calque.verify(path, q, test_inputs, target="coreml")  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["openvino", "qonnx"])
def test_a_missing_extra_is_named(
    q: QuantizedModel, test_inputs: Tensor, target: Target, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setitem(sys.modules, target, None)

    with pytest.raises(MissingExtraError, match=rf"^{target} is not installed: pip install 'calque\[{target}\]'"):
        calque.verify(path, q, test_inputs, target=target)


@pytest.mark.parametrize("target", TARGETS[:2])
def test_eight_bit_weights_are_noted_where_the_processor_saturates(
    test_inputs: Tensor, target: Target, exported: Exported
) -> None:
    assert _notes_of(exported, test_inputs, target) == (saturates(target), False)


@pytest.mark.parametrize("answer", [False, True])
def test_the_note_of_eight_bit_weights_follows_the_processors_answer(
    test_inputs: Tensor, answer: bool, monkeypatch: pytest.MonkeyPatch, exported: Exported
) -> None:
    module = sys.modules["calque.shipping.verify"]  # no test runs on both kinds of processors
    monkeypatch.setattr(module, "saturates", lambda target: answer)

    assert _notes_of(exported, test_inputs, "onnxruntime") == (answer, False)


def _notes_of(exported: Exported, inputs: Tensor, target: Target) -> tuple[bool, bool]:
    """Whether the file of 8-bit weights has the note, and whether that of 7-bit weights has any."""
    wide, narrow = (
        calque.verify(path, q, inputs, target=target, bound=0).notes
        for q, path in (exported(bits="w8a8"), exported(bits="w7a8", first_last=None))
    )
    return any("8-bit weights" in note and "w7a8" in note for note in wide), bool(narrow)


def test_seven_bit_weights_are_exact_without_the_switch_for_exact_products(
    test_inputs: Tensor, exported: Exported
) -> None:
    q, path = exported(bits="w7a8", first_last=None)
    proto = load_proto(path)
    exact = q.integer()(test_inputs)

    plain = OnnxRuntime(proto, settings=DEFAULT).run([test_inputs])[0]

    torch.testing.assert_close(plain, exact)


def test_float_kernels_have_a_reason(test_inputs: Tensor, exported: Exported) -> None:
    left, weights = exported(override={"head": None}), exported(bits="w4", first_last=None)

    reasons = [calque.verify(path, q, test_inputs).reasons for q, path in (left, weights)]

    assert "on no grid" in reasons[0]["Gemm"]
    assert reasons[1]["MatMulNBits"] == "weights alone are quantized (head)"
    convolutions = [reason for operator, reason in reasons[1].items() if "Conv" in operator]  # fused or not
    assert convolutions
    assert all(reason.startswith("weights alone are quantized (") for reason in convolutions)


def test_a_convolution_in_blocks_of_channels_reads_what_it_reads_in_the_file() -> None:
    """Whether a processor gets such kernels depends on its vectors; what they are called does not."""
    conv = helper.make_node("Conv", ["x", "stem/weight", "stem/bias"], ["c"], "stem")
    add = helper.make_node("Add", ["c", "x"], ["sum"])
    relu = helper.make_node("Relu", ["sum"], ["r"])
    makers = {node.output[0]: node for node in (conv, add, relu)}

    for name in ("c_nchwc", "r_nchwc", "r_nchwc_token_7"):
        blocked = helper.make_node("Conv", ["x", "reorder", "reorder_token_0"], ["reorder_token_1"], name)
        assert _reads(blocked, makers) == ("x", "stem/weight", "stem/bias")
    assert _reads(conv, makers) == ("x", "stem/weight", "stem/bias")
    unknown = helper.make_node("Conv", ["x", "reorder"], ["y"], "other_nchwc")
    assert _reads(unknown, makers) == ("x", "reorder")


def test_a_verification_is_one_line_of_json(q: QuantizedModel, test_inputs: Tensor, path: Path) -> None:
    result = calque.verify(path, q, test_inputs)

    line = result.to_json()

    assert "\n" not in line
    assert json.loads(line)["optimized"]["exact"] == result.agreement_exact


def test_inputs_of_other_number_are_refused_by_every_runtime(test_inputs: Tensor, path: Path) -> None:
    with pytest.raises(VerificationError, match=r"the file has 1 inputs \(image\)\. Got 2"):
        run_onnx(path, [test_inputs, test_inputs])
    with pytest.raises(VerificationError, match=r"input image of the file is float32 \(batch, 1, 8, 8\)\. Got float32"):
        open_runtime(load_proto(path), "onnxruntime").run([test_inputs[:, :, :3, 0]])


class Halves(nn.Module):
    """A network whose images, 256 levels from -1 to 1, lie between the codes of that range."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return result


@pytest.mark.parametrize("recipe", ["nearest", "fast", "advanced"])
def test_images_do_not_lie_between_two_codes_of_the_input_grid(recipe: str) -> None:
    images = torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    q = calque.quantize(networks.seeded(Halves()), images, bits="w8a8", recipe=recipe)

    grid = q.quantizers["conv.input"]
    steps = images / grid.scale

    assert ((steps - steps.floor() - 0.5).abs() > 1e-4).double().mean() >= 0.99
    assert 0.99 * 2 / 255 <= grid.scale <= 1.01 * 2 / 255  # advanced learns it


@pytest.mark.parametrize("answer", [False, True])
def test_latency_is_that_of_the_default_session_and_where_products_need_a_setting_that_of_both(
    trained: nn.Module, test_inputs: Tensor, answer: bool, monkeypatch: pytest.MonkeyPatch, exported: Exported
) -> None:
    monkeypatch.setattr(sys.modules["calque.shipping.verify"], "saturates", lambda target: answer)
    q, path = exported(bits="w8a8")

    found = calque.verify(path, q, test_inputs, original=trained)

    assert found.latency is not None
    written = json.loads(found.to_json())["latency"]
    if answer:
        assert found.latency.exact_milliseconds is not None
        assert found.latency.exact_ratio == found.latency.exact_milliseconds / found.latency.float_milliseconds
        assert written["exact_settings"] == ["session.x64quantprecision = 1"]
        assert "latency with exact products:" in str(found)
    else:
        assert written["exact_milliseconds"] is None
        assert "exact products" not in str(found.latency)


def test_products_that_the_runtime_itself_would_compute_on_rounded_inputs_need_a_setting(
    trained: nn.Module, test_inputs: Tensor, exported: Exported
) -> None:
    fused, path = exported(bits="w4", first_last=None)

    found = calque.verify(path, fused, test_inputs, original=trained)

    assert found.latency is not None
    assert found.latency.exact_settings == ("session.qdq_matmulnbits_accuracy_level = 1",)
    assert any("MatMulNBits computes in float32 here" in note for note in found.notes)
