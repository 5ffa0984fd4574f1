"""Losses between two networks' outputs, against NumPy in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

import calque
import networks
from calque.calibration.losses import Loss, closeness, find_loss, kl, mse
from calque.errors import SpecError


def random(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def kl_in_numpy(reference: Tensor, output: Tensor) -> float:
    """sum p log(p / q) of each row, mean over the rows, in float64."""

    def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
        e = np.exp(x - x.max(-1, keepdims=True))
        result: NDArray[np.float64] = e / e.sum(-1, keepdims=True)
        return result

    p, q = (softmax(x.numpy().astype(np.float64)) for x in (reference, output))
    return float((p * np.log(p / q)).sum(-1).mean())


def mse_in_numpy(reference: Tensor, output: Tensor) -> float:
    """Squared error over the variance of the reference, in float64."""
    one, other = (x.numpy().astype(np.float64) for x in (reference, output))
    return float(((one - other) ** 2).mean() / one.var())


@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (3, 5, 4)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_kl_equals_numpy(shape: tuple[int, ...], spread: float) -> None:
    reference, output = random(shape, 1, spread), random(shape, 2, spread)

    assert kl([reference], [output]).item() == pytest.approx(kl_in_numpy(reference, output), rel=1e-5, abs=1e-6)


def test_kl_is_as_worked_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3; a row that agrees adds 0: half of it
    reference, output = torch.zeros(2, 2), torch.tensor([[0.0, float(np.log(3))], [5.0, 5.0]])

    assert kl([reference], [output]).item() == pytest.approx(0.25 * np.log(4 / 3), rel=1e-5)


def test_kl_is_taken_from_the_float_network() -> None:
    reference, output = random((5, 3), 1, 3.0), random((5, 3), 2, 3.0)

    forward, backward = kl([reference], [output]).item(), kl([output], [reference]).item()

    assert forward == pytest.approx(kl_in_numpy(reference, output), rel=1e-5)
    assert abs(forward - backward) > 0.1


@pytest.mark.parametrize("loss", [kl, mse])
def test_equal_outputs_lose_exactly_nothing(loss: object) -> None:
    leaves = [random((6, 4), 1, 5.0), random((6, 3), 2)]

    assert callable(loss)
    assert loss(leaves, [leaf.clone() for leaf in leaves]).item() == 0.0


@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4), st.lists(st.floats(-20, 20), min_size=4, max_size=4))
@settings(deadline=None)
def test_kl_is_not_negative_and_ignores_a_constant_added_to_a_row(one: list[float], other: list[float]) -> None:
    reference, output = random((4, 5), 1), random((4, 5), 2)

    moved = kl([reference + torch.tensor(one)[:, None]], [output + torch.tensor(other)[:, None]]).item()

    assert moved >= 0
    assert moved == pytest.approx(kl([reference], [output]).item(), rel=1e-4)  # float32 logits up to 20 and 5 classes


@pytest.mark.parametrize("shape", [(8,), (1, 6), (3, 2, 4, 4)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_mse_equals_numpy(shape: tuple[int, ...], mean: float) -> None:
    reference, output = random(shape, 1) + mean, random(shape, 2) + mean

    assert mse([reference], [output]).item() == pytest.approx(mse_in_numpy(reference, output), rel=1e-4)


def test_mse_ignores_a_common_scale_and_shift() -> None:
    reference, output = random((5, 3), 1), random((5, 3), 2)

    assert mse([reference * 8 + 2], [output * 8 + 2]).item() == pytest.approx(
        mse([reference], [output]).item(), rel=1e-4
    )


def test_mse_of_a_constant_output_is_finite() -> None:
    assert torch.isfinite(mse([torch.ones(3, 2)], [torch.ones(3, 2) + 1e-6]))


@pytest.mark.parametrize(("loss", "oracle"), [(kl, kl_in_numpy), (mse, mse_in_numpy)])
def test_several_outputs_add_up_and_what_is_no_float_tensor_is_left_out(loss: object, oracle: object) -> None:
    assert callable(loss)
    assert callable(oracle)
    reference = [random((4, 3), 1), torch.arange(4), random((4, 5), 2)]
    output = [random((4, 3), 3), torch.arange(4) + 1, random((4, 5), 4)]

    expected = oracle(reference[0], output[0]) + oracle(reference[2], output[2])

    assert loss(reference, output).item() == pytest.approx(expected, rel=1e-4)
    assert loss([*reference, "name"], [*output, "name"]).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", [kl, mse])
def test_the_gradient_of_a_loss_is_its_finite_difference(loss: object) -> None:
    assert callable(loss)
    reference, output = random((3, 4), 1).double(), random((3, 4), 2).double().requires_grad_()
    direction = random((3, 4), 3).double()

    (gradient,) = torch.autograd.grad(loss([reference], [output]), output)

    step = 1e-5
    ahead, behind = (loss([reference], [output.detach() + sign * step * direction]).item() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


# ---- which loss


def found(loss: object, *leaves: object) -> str:
    return find_loss(loss, leaves, pytree.tree_structure(list(leaves)))[0]  # type: ignore[arg-type]  # some wrong on purpose


def test_the_default_is_the_squared_error() -> None:
    assert found(None, torch.zeros(5, 3)) == "mse"


def test_a_loss_that_is_asked_for_is_taken() -> None:
    assert found("mse", torch.zeros(5, 3)) == "mse"
    assert found("kl", torch.zeros(5, 3), torch.zeros(5, 4, 2)) == "kl"


@pytest.mark.parametrize("leaf", [torch.zeros(5), torch.zeros(5, 3, dtype=torch.int64)])
def test_kl_without_an_axis_of_classes_is_refused(leaf: Tensor) -> None:
    with pytest.raises(
        SpecError, match=r'the loss "kl" needs outputs with an axis of classes, the last one\. Use "mse"'
    ):
        found("kl", leaf)


@pytest.mark.parametrize("loss", ["l1", 3])
def test_what_is_no_loss_is_refused(loss: object) -> None:
    with pytest.raises(SpecError, match=r'loss is "kl", "mse" or a function .* Got'):
        found(loss, torch.zeros(5, 3))


def test_a_function_receives_the_structure_that_forward_returns() -> None:
    received: list[object] = []

    def distance(reference: object, output: object) -> Tensor:
        received.extend([reference, output])
        return torch.tensor(0.5)

    reference = {"logits": torch.zeros(4, 3), "more": (torch.ones(2), [torch.zeros(1)])}
    leaves, spec = pytree.tree_flatten(reference)
    doubled: Sequence[Tensor] = [2 * leaf for leaf in leaves]

    name, loss = find_loss(distance, leaves, spec)

    assert name == "distance"
    assert loss(leaves, doubled).item() == 0.5
    assert all(pytree.tree_structure(each) == spec for each in received)
    for each, factor in zip(received, (1, 2), strict=True):
        expected = [factor * leaf for leaf in leaves]
        assert all(map(torch.equal, pytree.tree_leaves(each), expected))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"a loss returns one float number. Got torch.float32 of shape \(3,\)"),
        (torch.tensor(3), r"Got torch.int64 of shape \(\)"),
        (7, r"Got torch.int64 of shape \(\)"),
    ],
)
def test_a_function_that_returns_no_float_number_is_refused(value: object, message: str) -> None:
    leaves = [torch.zeros(2, 3)]
    _, loss = find_loss(lambda reference, output: value, leaves, pytree.tree_structure(leaves))  # type: ignore[arg-type, return-value]  # wrong on purpose

    with pytest.raises(SpecError, match=message):
        loss(leaves, leaves)


@pytest.mark.parametrize("value", [torch.tensor([[0.25]]), torch.tensor(0.25), 0.25])
def test_a_function_may_return_one_number_in_any_form(value: object) -> None:
    leaves = [torch.zeros(2, 3)]
    _, loss = find_loss(lambda reference, output: value, leaves, pytree.tree_structure(leaves))  # type: ignore[arg-type, return-value]  # a float too

    assert loss(leaves, leaves).shape == ()
    assert loss(leaves, leaves).item() == 0.25


def test_a_run_hands_its_loss_the_networks_own_outputs() -> None:
    seen: list[object] = []

    def on_logits(reference: object, output: object) -> Tensor:
        seen.append((reference, output))
        assert isinstance(reference, dict)
        assert isinstance(output, dict)
        return mse([reference["logits"]], [output["logits"]])

    net = networks.Net(
        lambda net, x: {"features": net.a(x), "logits": net.b(net.a(x).flatten(1))},
        a=torch.nn.Conv2d(1, 2, 3),
        b=torch.nn.Linear(72, 3),
    )
    q = calque.quantize(
        net, networks.images(20, seed=0), bits=("w8a8", "w4a4"), budget=calque.Budget(size="20kB"),
        recipe="nearest", loss=on_logits,
    )  # fmt: skip

    assert q.report.loss == "on_logits"
    assert len(seen) > 4


def test_a_loss_that_writes_into_what_it_gets_changes_nothing_else() -> None:
    def careless(reference: Tensor, output: Tensor) -> Tensor:
        value = (reference - output).square().mean()
        reference.fill_(7)
        output.zero_()
        return value

    reference, output = random((5, 3), 1), random((5, 3), 2)
    spec = pytree.tree_structure(output)
    _, loss = find_loss(careless, [reference], spec)  # type: ignore[arg-type]  # of tensors, as this network returns them

    first, second = (loss([reference], [output]).item() for _ in range(2))

    assert first == second == (random((5, 3), 1) - random((5, 3), 2)).square().mean().item()


@pytest.mark.parametrize(
    ("leaves", "judge"),
    [
        ([torch.zeros(3, 4)], kl),
        ([torch.zeros(3, 1)], mse),
        ([torch.zeros(3, 4, 2)], mse),
        ([torch.zeros(3, 4), torch.zeros(3, 4, 2)], mse),
        ([torch.zeros(3, 4, dtype=torch.int64)], mse),
    ],
)
def test_only_scores_of_classes_are_judged_by_kl(leaves: list[Tensor], judge: Loss) -> None:
    assert closeness(leaves) is judge


def test_mse_is_the_same_in_the_smallest_and_the_largest_units() -> None:
    one, other = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))

    plain = mse([one], [other])

    assert all(torch.equal(mse([one * unit], [other * unit]), plain) for unit in (2.0**-100, 2.0**100))


@pytest.mark.parametrize(("size", "expected"), [(1.0, kl), (1e-12, mse), (1e6, mse)])
def test_outputs_that_softmax_cannot_tell_apart_are_no_scores_of_classes(size: float, expected: object) -> None:
    assert closeness([torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * size]) is expected
