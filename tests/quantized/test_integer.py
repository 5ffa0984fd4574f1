import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import calque
import networks
import oracles
from calque.grid.arithmetic import EXACT_FLOAT32
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from networks import Net

CALIBRATION = networks.images(40, seed=0)
WITHIN, OUTSIDE = networks.images(4, seed=1), 5 * networks.images(4, seed=2)


def forward(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.a(x))
    z = F.relu(net.b(y) + y)
    logits: Tensor = net.fc(z.flatten(1))
    return logits


@pytest.fixture(scope="module", params=["w4a4", "w8a8", "w3a2"])
def quantized(request: pytest.FixtureRequest) -> QuantizedModel:
    net = Net(
        forward,
        a=nn.Conv2d(1, 4, 3, stride=2, padding=1),
        b=nn.Conv2d(4, 4, 3, padding=1),
        fc=nn.Linear(64, 3),
    )
    return calque.quantize(net, CALIBRATION, bits=request.param, recipe="nearest", first_last=None)


Codes = NDArray[np.int64]
Grid = tuple[np.float32, int, int]  # scale, zero point, qmax


def grid_of(quantizer: Quantizer) -> Grid:
    return np.float32(quantizer.scale.item()), int(quantizer.zero_point), quantizer.qmax


def accumulated(layer: QuantizedLayer, codes: Codes, grid: Grid) -> tuple[Codes, NDArray[np.float32]]:
    """int64 sums, bias included, and the float32 scale of each channel."""
    offsets, weight = codes - grid[1], layer.codes.numpy().astype(np.int64)
    if layer.geometry.kind == "linear":
        sums = oracles.linear(offsets, weight) + layer.bias.numpy()
        return sums.astype(np.int64), grid[0] * layer.scale.numpy()
    sums = oracles.convolution(offsets, weight, stride=layer.geometry.stride, padding=layer.geometry.padding)
    bias, scale = layer.bias.numpy(), grid[0] * layer.scale.numpy()
    return (sums + bias[:, None, None]).astype(np.int64), scale[:, None, None]


def requantized(sums: Codes, scale: NDArray[np.float32], grid: Grid, lowest: int = 0) -> Codes:
    factors = np.broadcast_to(scale / grid[0], sums.shape)
    result = np.empty(sums.shape, np.int64)
    for index in np.ndindex(*sums.shape):
        result[index] = oracles.requantize(int(sums[index]), float(factors[index]), grid[1], lowest, grid[2])
    return result


def regridded(codes: Codes, source: Grid, target: Grid) -> Codes:
    if source == target:
        return codes
    return oracles.quantize(
        oracles.dequantize(codes, float(source[0]), source[1]), float(target[0]), target[1], 0, target[2]
    )


def added(left: Codes, left_grid: Grid, right: Codes, right_grid: Grid, grid: Grid) -> Codes:
    """Both operands rescaled in float32, rounded once, clipped at zero (the ReLU)."""
    a = (left - left_grid[1]).astype(np.float32) * (left_grid[0] / grid[0])
    b = (right - right_grid[1]).astype(np.float32) * (right_grid[0] / grid[0])
    return np.clip(np.rint(a + b).astype(np.int64) + grid[1], grid[1], grid[2])


def oracle(q: QuantizedModel, x: Tensor) -> NDArray[np.float32]:
    layers, grids = q.layers, {name: grid_of(each) for name, each in q.quantizers.items()}
    at_image = grids["a.input"]
    image = oracles.quantize(x.numpy(), float(at_image[0]), at_image[1], 0, at_image[2])
    at_a, at_b = grids["a.output"], grids["b.output"]
    a = requantized(*accumulated(layers["a"], image, at_image), at_a, at_a[1])
    in_b = grids.get("b.input", at_a)
    b = requantized(*accumulated(layers["b"], regridded(a, at_a, in_b), in_b), at_b)
    at_sum = grids[next(name for name in grids if name.startswith("relu"))]
    total = added(b, at_b, a, at_a, at_sum)
    in_fc = grids.get("fc.input", at_sum)
    sums, scale = accumulated(layers["fc"], regridded(total, at_sum, in_fc).reshape(len(x), -1), in_fc)
    return sums.astype(np.float32) * scale


@pytest.mark.parametrize("x", [WITHIN, OUTSIDE], ids=["within", "far outside"])
def test_the_integer_evaluation_equals_loops_over_integers_exactly(quantized: QuantizedModel, x: Tensor) -> None:
    assert np.array_equal(quantized.integer()(x).numpy(), oracle(quantized, x))


@pytest.mark.parametrize("x", [WITHIN, OUTSIDE], ids=["within", "far outside"])
def test_the_float_simulation_is_at_most_one_step_away_on_every_edge(quantized: QuantizedModel, x: Tensor) -> None:
    codes = quantized.integer().trace(x)[1]
    simulated: dict[str, Tensor] = {}
    hooks = [
        each.register_forward_hook(lambda m, _, y, name=name: simulated.update({name: y / m.scale + m.zero_point}))
        for name, each in quantized.quantizers.items()
    ]
    quantized(x)
    for hook in hooks:
        hook.remove()

    assert codes.keys() == simulated.keys()
    for name, expected in codes.items():
        apart = (simulated[name] - expected).abs()
        assert apart.max() < 1.01, name
        assert (apart > 0.5).float().mean() < 0.01, name


def test_the_codes_of_a_trace_are_within_their_bits(quantized: QuantizedModel) -> None:
    codes = quantized.integer().trace(OUTSIDE)[1]

    assert all(codes[name].max() <= grid.qmax for name, grid in quantized.quantizers.items())
    assert all(each.dtype == torch.uint8 for each in codes.values())


def test_sums_beyond_float32_are_exact() -> None:
    """30 000 products of up to 255 x 127 sum to more than 2^24 and less than 2^31."""
    net = nn.Sequential(nn.Linear(30_000, 1))
    net.state_dict()["0.weight"].fill_(1.0)
    q = calque.quantize(
        net, torch.rand(6, 30_000, generator=torch.Generator().manual_seed(0)), bits="w8a8", recipe="nearest"
    )
    layer, grid = q.layers["0"], q.quantizers["0.input"]
    x = torch.full((1, 30_000), grid.range[1])
    x[0, :3] = grid.scale

    sums = q.integer()(x) / (grid.scale * layer.scale)

    exact = int(layer.codes.long().sum()) * grid.qmax - 3 * (grid.qmax - 1) * 127 + int(layer.bias)
    assert exact > EXACT_FLOAT32
    assert sums.item() == pytest.approx(exact, rel=2**-22)


@pytest.mark.parametrize("placement", ["integer", "inputs"])
def test_two_clips_in_a_row_both_clip(placement: str) -> None:
    net = Net(lambda net, x: F.hardtanh(F.relu(net.fc(x.flatten(1))), -0.5, 0.5), fc=nn.Linear(64, 4))
    q = calque.quantize(net, CALIBRATION, recipe="nearest", placement=placement)  # type: ignore[arg-type]

    torch.testing.assert_close(q.integer()(WITHIN), q(WITHIN), rtol=0.0, atol=1e-5)


def test_what_has_no_integer_kernel_runs_on_real_values() -> None:
    net = Net(lambda net, x: net.fc(torch.tanh(net.a(x)).flatten(1)), a=nn.Conv2d(1, 4, 3), fc=nn.Linear(144, 3))
    q = calque.quantize(net, CALIBRATION, bits="w8a8", recipe="nearest")

    error = (q.integer()(WITHIN) - net(WITHIN)).detach().abs().max()

    assert error < 0.05 * net(WITHIN).detach().abs().max()


def test_movements_work_on_codes() -> None:
    def moved(net: Net, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.pad(F.relu(net.a(x)), (1, 0, 1, 0)), 2)
        left, right = y.chunk(2, 1)
        return net.b(left.transpose(2, 3) + right)  # type: ignore[no-any-return]

    q = calque.quantize(
        Net(moved, a=nn.Conv2d(1, 4, 3, padding=1), b=nn.Conv2d(2, 2, 1)), CALIBRATION, recipe="nearest"
    )

    steps = next(iter(reversed(q.quantizers.values()))).scale
    assert ((q.integer()(WITHIN) - q(WITHIN)).abs() / steps).max() < 1.01


def test_the_integer_evaluation_has_the_signature_of_the_network(quantized: QuantizedModel) -> None:
    assert torch.equal(quantized.integer()(x=WITHIN), quantized.integer()(WITHIN))


def test_every_output_has_the_step_of_its_grid_or_of_its_sums() -> None:
    net = Net(
        lambda net, x: (net.a(x), net.fc(F.relu(net.a(x)).flatten(1)), torch.sigmoid(net.a(x)), net.a(x).argmax(1)),
        a=nn.Conv2d(1, 4, 3), fc=nn.Linear(144, 3),
    )  # fmt: skip
    q = calque.quantize(net, CALIBRATION, bits="w8a8", recipe="nearest", placement="inputs")

    outputs, _, steps = q.integer().trace(WITHIN)

    assert [None if step is None else tuple(step.shape) for step in steps] == [(1, 4, 1, 1), (3,), None, None]
    for output, step in zip(outputs[:2], steps[:2], strict=True):
        assert step is not None
        sums = output.double() / step
        torch.testing.assert_close(sums, sums.round(), rtol=0, atol=0.01)


def test_of_equal_values_the_first_comes_first_as_onnx_has_it() -> None:
    def best(net: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = net.a(x).flatten(1).round()
        return (*y.topk(40, 1), *y.sort(1))

    q = calque.quantize(Net(best, a=nn.Conv2d(1, 2, 3)), CALIBRATION, bits="w8a8", recipe="nearest")

    values, indices, rising, order = q.integer()(WITHIN)

    assert len(values[0].unique()) < 10  # most are equal to others
    for found, where in ((values, indices), (rising, order)):
        equal = found[:, 1:] == found[:, :-1]
        assert (where[:, 1:] > where[:, :-1])[equal].all()
