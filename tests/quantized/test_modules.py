import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import networks
import oracles
from calque.errors import SpecError
from calque.network import Geometry
from calque.quantized.modules import QuantizedLayer, Quantizer


def quantizer(scale: float = 0.5, zero_point: int = 3, bits: int = 4) -> Quantizer:
    return Quantizer(torch.tensor(scale), torch.tensor(zero_point), bits=bits)


@given(st.floats(0.0625, 4, width=32), st.integers(0, 3), st.integers(2, 8))
@settings(deadline=None, max_examples=30)
def test_a_quantizer_equals_the_oracle(scale: float, zero_point: int, bits: int) -> None:
    x = networks.images(1, seed=0).mul(3)[0, 0]

    output = quantizer(scale, zero_point, bits)(x)

    codes = oracles.quantize(x.numpy(), scale, zero_point, 0, 2**bits - 1)
    assert np.array_equal(output.numpy(), oracles.dequantize(codes, scale, zero_point))


def test_the_range_of_a_quantizer_is_what_it_can_return() -> None:
    grid = quantizer(0.5, 3, 4)

    assert grid.range == (-1.5, 6.0)
    assert grid(torch.tensor([-1e9, 1e9])).tolist() == [-1.5, 6.0]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_and_positive_is_refused(scale: float) -> None:
    with pytest.raises(SpecError, match="a quantizer's scale must be a finite positive scalar"):
        quantizer(scale)


def test_a_scale_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(SpecError, match="a quantizer's scale must be a finite positive scalar"):
        Quantizer(torch.ones(2), torch.tensor(0), bits=4)


@pytest.mark.parametrize("zero_point", [-1, 16])
def test_a_zero_point_off_the_grid_is_refused(zero_point: int) -> None:
    with pytest.raises(SpecError, match=r"zero point must lie in \[0, 15\]. Got " + f".*{zero_point}"):
        quantizer(zero_point=zero_point)


def layer(bias: Tensor, bias_scale: Tensor | None) -> QuantizedLayer:
    codes = torch.tensor([[1, -2, 3], [-8, 7, 0]], dtype=torch.int8)
    return QuantizedLayer(Geometry("linear"), codes, torch.tensor([0.5, 0.25]), bias, bias_scale, bits=4)


def test_a_layer_on_a_grid_is_worked_by_hand() -> None:
    """Input steps of 0.5, offsets (2, 1, -1): sums 2 - 2 - 3 = -3 and -16 + 7 = -9; biases 4 and -1 make 1
    and -10; scales 0.25 and 0.125."""
    made = layer(torch.tensor([4, -1], dtype=torch.int32), 0.5 * torch.tensor([0.5, 0.25]))

    assert made(torch.tensor([[1.0, 0.5, -0.5]])).tolist() == [[0.25, -1.25]]
    assert made.weight.tolist() == [[0.5, -1.0, 1.5], [-2.0, 1.75, 0.0]]
    assert made.real_bias.tolist() == [1.0, -0.125]


def test_a_layer_on_a_float_input_has_a_float_bias() -> None:
    made = layer(torch.tensor([0.3, -0.1]), None)

    expected = [[0.5 * 1 - 1.0 * 0.3 + 1.5 * 2 + 0.3, -2.0 + 1.75 * 0.3 - 0.1]]
    torch.testing.assert_close(made(torch.tensor([[1.0, 0.3, 2.0]])), torch.tensor(expected))


@pytest.mark.parametrize(
    ("codes", "scale", "bias"),
    [
        (torch.zeros(2, 3), torch.ones(2), torch.zeros(2)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(1), torch.zeros(2)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), torch.zeros(3)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(codes: Tensor, scale: Tensor, bias: Tensor) -> None:
    with pytest.raises(SpecError, match="a quantized layer needs int8 codes"):
        QuantizedLayer(Geometry("linear"), codes, scale, bias, None, bits=4)
