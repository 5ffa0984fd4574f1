import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.errors import CalibrationError
from calque.network import capture
from calque.quantized.assembled import assemble, grid_of
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer
from networks import Net

INPUTS = networks.images(6, seed=5)


@pytest.fixture(scope="module")
def quantized(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    return calque.quantize(trained, calibration, bits="w4a4", recipe="nearest")


def test_a_batch_of_one_gives_the_row_of_a_larger_batch(quantized: QuantizedModel) -> None:
    assert torch.allclose(quantized(INPUTS[2:3]), quantized(INPUTS)[2:3], atol=1e-6)
    assert quantized(INPUTS[:1]).shape == (1, networks.CLASSES)


def test_a_deep_copy_gives_equal_outputs_and_shares_nothing(quantized: QuantizedModel) -> None:
    twin = copy.deepcopy(quantized)
    before = quantized(INPUTS)

    assert torch.equal(twin(INPUTS), before)
    for buffer in twin.buffers():
        buffer.zero_()
    assert torch.equal(quantized(INPUTS), before)


def test_a_state_dict_carries_a_quantized_network_into_its_copy(quantized: QuantizedModel) -> None:
    twin = copy.deepcopy(quantized)
    for buffer in twin.buffers():
        buffer.zero_()

    twin.load_state_dict(quantized.state_dict(), strict=True)

    assert torch.equal(twin(INPUTS), quantized(INPUTS))


def test_moving_to_float64_changes_the_simulation_by_rounding_only(quantized: QuantizedModel) -> None:
    twin = copy.deepcopy(quantized).to(torch.float64)

    output = twin(INPUTS.double())

    assert output.dtype == torch.float64
    assert (output - quantized(INPUTS)).abs().max() < 0.2 * quantized(INPUTS).std()
    assert all(layer.codes.dtype == torch.int8 for layer in twin.layers.values())


def test_a_quantized_network_is_in_eval_mode_and_has_no_trained_parameters(quantized: QuantizedModel) -> None:
    assert not any(module.training for module in quantized.modules())
    (empty,) = quantized.parameters()  # scoring functions ask the first for its device
    assert (empty.numel(), empty.requires_grad, empty.device.type) == (0, False, "cpu")
    assert not [*quantized.named_parameters()]


def test_arguments_are_taken_by_the_original_names(quantized: QuantizedModel) -> None:
    assert torch.equal(quantized(image=INPUTS), quantized(INPUTS))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"needs the argument\(s\) image. Got: none"),
        ((INPUTS, INPUTS), {}, r"at most 1 positional arguments \(image\). Got 2"),
        ((), {"picture": INPUTS}, "'picture' is not a parameter of forward"),
    ],
)
def test_a_call_that_forward_would_refuse_is_refused(
    quantized: QuantizedModel, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        quantized(*args, **kwargs)


def test_inputs_of_another_structure_than_captured_are_refused(quantized: QuantizedModel) -> None:
    with pytest.raises(TypeError, match=r"image was a tensor at calibration\. Got a list of 1"):
        quantized([INPUTS])


def test_layers_and_quantizers_are_in_the_order_of_execution(quantized: QuantizedModel) -> None:
    assert list(quantized.layers) == ["stem", "conv1", "conv2", "down", "head"]
    assert list(quantized.quantizers)[:3] == ["stem.input", "stem.output", "conv1.input"]
    assert all(isinstance(layer, QuantizedLayer) for layer in quantized.layers.values())


def test_every_quantized_layer_reads_a_grid_whose_scale_is_in_its_bias_scale(
    quantized: QuantizedModel,
) -> None:
    module = quantized.graph_module
    for node in module.graph.nodes:
        layer = quantized.layers.get(str(node.target))
        if layer is not None:
            grid = grid_of(module, node.args[0])
            assert grid is not None
            assert layer.bias_scale is not None
            torch.testing.assert_close(layer.bias_scale, grid.scale * layer.scale, rtol=1e-6, atol=0.0)


def test_assembling_leaves_the_captured_network_alone() -> None:
    network = capture(networks.small(), {"input": INPUTS})
    before = network.module.code

    assemble(network, [], {}, {}, calque.Plan({}))

    assert network.module.code == before


def test_a_module_called_quantizers_keeps_its_layers() -> None:
    net = nn.Sequential()
    net.add_module("quantizers", nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    networks.seeded(net)

    q = calque.quantize(net, networks.images(60, seed=0), recipe="nearest")

    assert list(q.layers) == ["quantizers.1"]
    assert (q(INPUTS) - net(INPUTS)).detach().abs().max() < 0.05 * net(INPUTS).detach().std()


def test_an_operator_that_returns_a_tuple_can_feed_a_layer() -> None:
    net = Net(
        lambda net, x: net.fc(net.conv(x).flatten(2).max(2).values),
        conv=nn.Conv2d(1, 4, 3),
        fc=nn.Linear(4, 3),
    )
    q = calque.quantize(net, networks.images(60, seed=0), recipe="nearest")

    assert (q(INPUTS) - net(INPUTS)).abs().max() < 0.1 * net(INPUTS).std()


def test_the_plan_of_a_quantized_network_can_be_pickled(quantized: QuantizedModel) -> None:
    assert pickle.loads(pickle.dumps(quantized.plan)) == quantized.plan


def test_bytes_in_place_of_real_numbers_are_refused() -> None:
    q = calque.quantize(networks.small(), networks.images(16, 0), recipe="nearest")

    with pytest.raises(
        TypeError, match=r"was captured as torch.float32. Got torch.uint8; prepare it as in calibration"
    ):
        q(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
