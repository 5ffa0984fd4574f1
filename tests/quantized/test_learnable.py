import copy

import pytest
import torch
from torch import Tensor

from calque.grid.arithmetic import BIAS_LIMIT, learned_fake_quantize
from calque.network import Geometry
from calque.quantized.learnable import (
    SMALLEST_UNIT,
    FixedQuantizer,
    LearnableBias,
    LearnableCodes,
    LearnableLayer,
    LearnableQuantizer,
    LearnableScale,
    output_unit,
)
from calque.quantized.modules import QuantizedLayer, Quantizer

INPUT_SCALE = torch.tensor(0.25)


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(zero_point: int = 3) -> Quantizer:
    return Quantizer(torch.tensor(0.37), torch.tensor(zero_point), bits=3)


def layer(*, on_grid: bool = True, bits: int = 4) -> QuantizedLayer:
    codes = torch.tensor([[1, -2, 3], [0, 7, -8]], dtype=torch.int8)
    scale = torch.tensor([0.1, 0.03])
    if not on_grid:
        return QuantizedLayer(Geometry("linear"), codes, scale, torch.tensor([0.5, -0.2]), None, bits=bits)
    bias = torch.tensor([2**29 + 1, -7], dtype=torch.int32)  # float32 does not have the first one
    return QuantizedLayer(Geometry("linear"), codes, scale, bias, INPUT_SCALE * scale, bits=bits)


KINDS = [LearnableBias, LearnableScale, LearnableCodes]


def test_a_fixed_quantizer_gives_the_quantizers_values_and_the_learned_ones_gradient() -> None:
    q = quantizer()
    x, again = (torch.linspace(-3, 3, 402).requires_grad_() for _ in range(2))
    pull = values((402,))

    y = FixedQuantizer(q)(x)
    expected = learned_fake_quantize(again, q.scale, q.zero_point.float(), q.qmin, q.qmax)

    assert torch.equal(y, q(x.detach()))
    (gradient,) = torch.autograd.grad(y, x, pull)
    (learned,) = torch.autograd.grad(expected, again, pull)
    torch.testing.assert_close(gradient, learned)
    inside = (x / q.scale).round().abs() <= 3  # codes 0 to 6; 7 is inside on the positive side as well
    assert torch.equal(gradient[inside], pull[inside])
    assert (gradient[x < -3.5 * q.scale] == 0).all()


@pytest.mark.parametrize("zero_point", [0, 3])
def test_a_learnable_quantizer_starts_as_the_quantizer_and_comes_back_as_it(zero_point: int) -> None:
    q, x = quantizer(zero_point), values((50,))
    twin = LearnableQuantizer(q)

    torch.testing.assert_close(twin(x), q(x))
    assert torch.equal(twin.restored().scale, q.scale)
    assert torch.equal(twin.restored().zero_point, q.zero_point)
    assert set(twin.leaves()) == ({"activation_scale", "zero_point"} if zero_point else {"activation_scale"})


def test_a_restored_quantizer_has_what_was_learned() -> None:
    twin = LearnableQuantizer(quantizer(3))
    with torch.no_grad():
        twin.leaves()["activation_scale"] += 0.5
        twin.leaves()["zero_point"] += 1.7

    restored = twin.restored()

    assert restored.scale.item() == pytest.approx(0.37 * 1.6487213)  # e^0.5
    assert restored.zero_point == 5
    torch.testing.assert_close(twin(values((50,))), restored(values((50,))))


def test_a_learned_zero_point_stays_on_its_grid() -> None:
    twin = LearnableQuantizer(quantizer(3))
    with torch.no_grad():
        twin.leaves()["zero_point"] += 100.0

    assert twin.restored().zero_point == 7


@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_has_not_moved_comes_back_as_it_was(kind: type[LearnableLayer], on_grid: bool) -> None:
    start = layer(on_grid=on_grid)
    twin = kind(start, torch.tensor([0.3, 7.0]))

    back = twin.restored(INPUT_SCALE if on_grid else None)

    for name, value in start.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    x = 0.25 * values((5, 3)).round()
    torch.testing.assert_close(twin(x), start(x))


@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_layer_computes_what_its_stand_in_computes(kind: type[LearnableLayer], on_grid: bool) -> None:
    start = layer(on_grid=on_grid)
    start.bias[0] = 3
    twin = kind(start, torch.tensor([0.3, 7.0]))
    with torch.no_grad():
        for seed, leaf in enumerate(twin.leaves().values()):
            leaf += 0.7 * values(tuple(leaf.shape), seed)

    back = twin.restored(INPUT_SCALE if on_grid else None)

    x = 0.25 * values((5, 3)).round()
    half_a_step = 0.0 if back.bias_scale is None else back.bias_scale.max().item() / 2
    torch.testing.assert_close(twin(x), back(x), rtol=1e-5, atol=half_a_step + 1e-5)
    assert not torch.equal(back.bias, start.bias)
    assert torch.equal(back.codes, start.codes) == (kind is not LearnableCodes)
    assert torch.equal(back.scale, start.scale) == (kind is LearnableBias)


def test_levels_outside_the_grid_are_clamped_and_get_no_gradient() -> None:
    twin = LearnableCodes(layer(), torch.ones(2))
    levels = twin.leaves()["weight"]
    with torch.no_grad():
        levels[0, 0] = 99.0

    (gradient,) = torch.autograd.grad(twin.weight().sum(), levels)

    assert twin.restored(INPUT_SCALE).codes[0, 0] == 7
    assert gradient[0, 0] == 0
    torch.testing.assert_close(gradient[0, 1:], torch.full((2,), 0.1))


def test_a_bias_that_leaves_int32_gets_a_larger_weight_scale_where_codes_may_move() -> None:
    twin = LearnableCodes(layer(), torch.tensor([1e9, 1.0]))
    with torch.no_grad():
        twin.leaves()["bias"][0] += 1.0

    back = twin.restored(INPUT_SCALE)

    assert back.bias.abs().max() <= BIAS_LIMIT
    assert back.real_bias[0].item() == pytest.approx(1e9 + layer().real_bias[0].item(), rel=1e-5)
    assert back.scale[1] == layer().scale[1]


def test_the_unit_of_a_bias_is_the_deviation_of_its_channel_and_never_tiny_beside_the_others() -> None:
    outputs = values((1000, 2)) * torch.tensor([3.0, 0.0]) + 5

    unit = output_unit(layer(), outputs)

    deviation = outputs[:, 0].std(correction=0)
    torch.testing.assert_close(unit, torch.stack([deviation, SMALLEST_UNIT * deviation / 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_never_changes_the_layer_it_stands_for(kind: type[LearnableLayer]) -> None:
    start = layer()
    before = copy.deepcopy(start.state_dict())
    twin = kind(start, torch.ones(2))
    with torch.no_grad():
        for leaf in twin.leaves().values():
            leaf += 1.0

    twin.restored(INPUT_SCALE)

    assert all(torch.equal(value, start.state_dict()[name]) for name, value in before.items())
