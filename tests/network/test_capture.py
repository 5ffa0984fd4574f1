import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import networks
import oracles
from calque.errors import CalibrationError, CaptureError
from calque.network import Batch, Geometry, Network, Signature, capture
from calque.network.network import find_shortcuts
from calque.network.signature import flatten, rows, select, split
from networks import Net

X = networks.images(5, seed=0, channels=4)


def call(network: Network, batch: Batch) -> object:
    return pytree.tree_unflatten(network.module(*flatten(batch)[0]), network.out_spec)


def captured(model: nn.Module, x: Tensor = X) -> Network:
    """The network, after a check that it computes what the model does at several batch sizes."""
    network = capture(model, {"x": x})
    for size in (1, 2, len(x)):
        expected, received = model(x[:size]), call(network, {"x": x[:size]})
        assert pytree.tree_structure(expected) == pytree.tree_structure(received)
        for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(received), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return network


def names(network: Network) -> list[str]:
    return list(network.layers)


def targets(network: Network) -> list[str]:
    return [str(node.target) for node in network.nodes()]


WEIGHT = torch.zeros(6, 4, 3, 3)  # Net draws the values


# ---- layers: every form of convolution and linear operator


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, (3, 1), groups=4, stride=(1, 2)),
        nn.Conv2d(4, 6, 3, dilation=2, padding=2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (2, 3), padding="same"),
        nn.Conv2d(4, 6, 4, padding="same", dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, padding="valid"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_every_module_convolution_is_a_layer_under_its_path(layer: nn.Module) -> None:
    network = captured(Net(lambda net, x: net.conv(x), conv=layer))

    assert names(network) == ["conv"]


def test_nested_modules_keep_their_paths() -> None:
    model = networks.seeded(
        nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Flatten(), nn.Linear(256, 2))
    )
    network = capture(model, {"input": X})

    assert names(network) == ["0.0", "2"]


def test_a_functional_convolution_gets_the_name_of_the_graph() -> None:
    network = captured(Net(lambda net, x: F.conv2d(x, net.weight, stride=2, padding=1), weight=WEIGHT))

    assert names(network) == ["conv2d"]
    assert network.weighted("conv2d").geometry == Geometry("convolution", (2, 2), (1, 1, 1, 1))


def test_a_functional_linear_gets_the_name_of_the_graph() -> None:
    network = captured(
        Net(lambda net, x: F.linear(x, net.weight, net.bias), weight=torch.zeros(3, 8), bias=torch.zeros(3))
    )

    assert names(network) == ["linear"]


def test_a_module_weight_used_by_a_function_gets_the_name_of_the_graph() -> None:
    network = captured(Net(lambda net, x: F.conv2d(x, net.conv.weight), conv=nn.Conv2d(4, 6, 3)))

    assert names(network) == ["conv2d"]


def test_a_functional_layer_and_a_module_of_the_same_name_stay_apart() -> None:
    network = captured(
        Net(
            lambda net, x: net.linear(F.linear(x, net.weight)),
            weight=torch.zeros(8, 8),
            linear=nn.Linear(8, 8),
        )
    )

    assert len(names(network)) == 2


@pytest.mark.parametrize("pad", [(1, 0, 2, 1), (0, 1, 0, 1), (2, 2, 0, 0)])
def test_an_asymmetric_zero_padding_is_absorbed(pad: tuple[int, int, int, int]) -> None:
    network = captured(
        Net(
            lambda net, x: net.conv(net.pad(x)),
            pad=nn.ZeroPad2d(pad),
            conv=nn.Conv2d(4, 6, 3, stride=2, padding=1),
        )
    )

    left, right, top, bottom = pad
    assert network.weighted("conv").geometry.padding == (top + 1, left + 1, bottom + 1, right + 1)
    assert not any("pad" in target for target in targets(network))


@pytest.mark.parametrize("pad", [nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1), nn.ZeroPad2d(-1)], ids=str)
def test_a_padding_with_something_else_is_not_absorbed(pad: nn.Module) -> None:
    network = captured(Net(lambda net, x: net.conv(net.pad(x)), pad=pad, conv=nn.Conv2d(4, 6, 3)))

    assert network.weighted("conv").geometry.padding == (0, 0, 0, 0)


def test_a_padding_that_others_read_too_stays_for_them() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        result: Tensor = net.conv(padded) + padded[:, :, 1:-1, 1:-1]
        return result

    network = captured(Net(forward, conv=nn.Conv2d(4, 4, 3)))

    assert network.weighted("conv").geometry.padding == (1, 1, 1, 1)


def test_a_linear_layer_takes_three_axes() -> None:
    network = captured(Net(lambda net, x: net.fc(x.flatten(1, 2)), fc=nn.Linear(8, 3)))

    assert names(network) == ["fc"]


def test_a_weight_normed_convolution_is_a_layer_with_its_computed_weight() -> None:
    model = Net(lambda net, x: net.conv(x), conv=torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)))

    network = captured(model)

    assert names(network) == ["conv"]
    torch.testing.assert_close(network.weighted("conv").weight, model.conv.weight)


def test_a_weight_computed_from_the_input_makes_no_layer_and_is_listed() -> None:
    network = captured(Net(lambda net, x: F.linear(x, x.mean((0, 1))) + net.fc(x), fc=nn.Linear(8, 8)))

    assert names(network) == ["fc"]
    assert any("linear" in sentence and "stays float" in sentence for sentence in network.left_float)


@pytest.mark.parametrize(
    ("part", "where"),
    [
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.LayerNorm(8), "layer_norm"),
    ],
    ids=str,
)
def test_an_operator_with_weights_that_stays_float_is_listed(part: nn.Module, where: str) -> None:
    network = captured(Net(lambda net, x: net.part(net.conv(x)), conv=nn.Conv2d(4, 4, 1), part=part))

    assert len(network.left_float) == 1
    assert where in network.left_float[0]
    assert "in part stays float" in network.left_float[0]


# ---- modules called twice


def test_a_module_called_twice_has_two_names_and_one_weight() -> None:
    network = captured(Net(lambda net, x: net.c(F.relu(net.c(x))), c=nn.Conv2d(4, 4, 3, padding=1)))

    assert names(network) == ["c", "c#2"]
    assert network.shared == {"c#2": "c"}


def test_a_module_called_twice_with_unlike_batch_norms_shares_nothing() -> None:
    network = captured(
        Net(
            lambda net, x: net.norm2(net.c(F.relu(net.norm1(net.c(x))))),
            c=nn.Conv2d(4, 4, 3, padding=1), norm1=nn.BatchNorm2d(4), norm2=nn.BatchNorm2d(4),
        )
    )  # fmt: skip

    assert names(network) == ["c", "c#2"]
    assert network.shared == {}


def test_one_parameter_in_two_modules_is_found_as_shared() -> None:
    model = Net(lambda net, x: net.b(net.a(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    model.b.weight = model.a.weight

    network = captured(model)

    assert len(network.layers) == 2
    assert list(network.shared.values()) == [names(network)[0]]


# ---- batch norms


def norms_left(network: Network) -> int:
    return sum("batch_norm" in target for target in targets(network))


def test_batch_norms_behind_convolutions_are_folded() -> None:
    network = captured(networks.seeded(RenamedResidual()), networks.images(5, seed=1))

    assert norms_left(network) == 0
    assert network.left_float == ()


class RenamedResidual(networks.Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_folded_batch_norm_is_worked_by_hand() -> None:
    """gamma 3, beta 1, mean 2, var 4 - eps behind 5 x + 7: 3 (5 x + 7 - 2) / 2 + 1 = 7.5 x + 8.5."""
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)
    model = Net(lambda net, x: net.norm(net.conv(x)), conv=conv, norm=norm)
    state = {"conv.weight": 5.0, "conv.bias": 7.0, "norm.weight": 3.0, "norm.bias": 1.0}
    state |= {"norm.running_mean": 2.0, "norm.running_var": 4.0 - norm.eps}
    for name, value in state.items():
        model.state_dict()[name].fill_(value)

    layer = capture(model, {"x": networks.images(2, seed=0)}).weighted("conv")

    assert layer.weight.item() == pytest.approx(7.5)
    assert layer.bias.item() == pytest.approx(8.5)


def test_a_batch_norm_behind_a_linear_layer_is_folded() -> None:
    network = captured(Net(lambda net, x: net.norm(net.fc(x.flatten(1))), fc=nn.Linear(256, 6), norm=nn.BatchNorm1d(6)))

    assert norms_left(network) == 0


def behind_transpose(net: Net, x: Tensor) -> object:
    return net.norm(net.fc(x.flatten(1, 2)).transpose(1, 2))


def behind_permute(net: Net, x: Tensor) -> object:
    return net.norm(net.fc(x.flatten(1, 2)).permute(0, 2, 1).contiguous())


def behind_view(net: Net, x: Tensor) -> object:
    return net.norm(net.fc(x.flatten(1, 2)).reshape(-1, 6))


def behind_slice(net: Net, x: Tensor) -> object:
    return net.norm(net.fc(x.flatten(1, 2))[:, 1:].transpose(1, 2))


@pytest.mark.parametrize("forward", [behind_transpose, behind_permute, behind_view, behind_slice])
def test_a_batch_norm_behind_moved_channels_is_folded(forward: Callable[[Net, Tensor], object]) -> None:
    network = captured(Net(forward, fc=nn.Linear(8, 6), norm=nn.BatchNorm1d(6)))

    assert norms_left(network) == 0


def other_channels(net: Net, x: Tensor) -> object:
    return net.norm(net.fc(x.flatten(1, 2)).reshape(x.shape[0], 6, -1))


def some_channels(net: Net, x: Tensor) -> object:
    return net.norm(net.wide(x.flatten(1, 2))[:, :, 1:7].transpose(1, 2))


def read_between(net: Net, x: Tensor) -> object:
    y = net.fc(x.flatten(1, 2)).transpose(1, 2)
    return net.norm(y) + y


@pytest.mark.parametrize("forward", [other_channels, some_channels, read_between])
def test_a_batch_norm_behind_mixed_or_shared_channels_stays_float(forward: Callable[[Net, Tensor], object]) -> None:
    network = captured(Net(forward, fc=nn.Linear(8, 6), wide=nn.Linear(8, 8), norm=nn.BatchNorm1d(6)))

    assert norms_left(network) == 1


def test_batch_norms_without_affine_parameters_are_folded() -> None:
    network = captured(
        Net(
            lambda net, x: net.norm(net.conv(x)),
            conv=nn.Conv2d(4, 6, 3),
            norm=nn.BatchNorm2d(6, affine=False),
        )
    )

    assert norms_left(network) == 0


@pytest.mark.parametrize("features", [5, 32])
def test_a_batch_norm_over_another_axis_than_the_layers_channels_stays_float(features: int) -> None:
    network = captured(
        Net(
            lambda net, x: net.norm(net.fc(x.flatten(1, 2))),
            fc=nn.Linear(8, features),
            norm=nn.BatchNorm1d(32),
        )
    )

    assert norms_left(network) == 1


def preactivation(net: Net, x: Tensor) -> object:
    return net.conv(F.relu(net.norm(x)))


def behind_activation(net: Net, x: Tensor) -> object:
    return net.norm(F.relu(net.conv(x)))


def read_twice(net: Net, x: Tensor) -> object:
    y = net.conv(x)
    return net.norm(y) + y


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (preactivation, "does not follow a weighted layer"),
        (behind_activation, "does not follow a weighted layer"),
        (read_twice, "follows a layer that other operators read too"),
    ],
)
def test_a_batch_norm_that_cannot_be_folded_stays_float_and_is_listed(
    forward: Callable[[Net, Tensor], object], reason: str
) -> None:
    network = captured(Net(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)))

    assert norms_left(network) == 1
    assert len(network.left_float) == 1
    assert "batch norm norm stays float" in network.left_float[0]
    assert reason in network.left_float[0]


def test_batch_norms_that_stay_float_for_one_reason_are_one_sentence() -> None:
    norms = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(5)))
    network = captured(Net(lambda net, x: net.norms(F.relu(net.conv(x))), conv=nn.Conv2d(4, 4, 1), norms=norms))

    assert network.left_float == (
        "5 batch norms stay float: norms.0, norms.1, norms.2, ...: each does not follow a weighted layer.",
    )


def test_a_batch_norm_that_normalizes_with_the_batch_stays_float() -> None:
    model = Net(
        lambda net, x: net.norm(net.conv(x)), conv=nn.Conv2d(4, 4, 1),
        norm=nn.BatchNorm2d(4, track_running_stats=False),
    )  # fmt: skip

    assert norms_left(capture(model, {"x": X})) == 1


# ---- activations, in-place operators


@pytest.mark.parametrize(
    ("activation", "clips"),
    [
        (nn.ReLU(), True),
        (nn.ReLU(inplace=True), True),
        (nn.ReLU6(), True),
        (nn.Hardtanh(0.0, 2.0), True),
        (nn.Hardtanh(), False),
        (nn.SiLU(), False),
        (nn.GELU(), False),
        (nn.LeakyReLU(), False),
        (nn.Sigmoid(), False),
    ],
    ids=str,
)
def test_the_activation_behind_a_layer_is_fused_and_the_result_is_the_clip(activation: nn.Module, clips: bool) -> None:
    layer = captured(Net(lambda net, x: net.act(net.conv(x)), conv=nn.Conv2d(4, 4, 1), act=activation)).layers["conv"]

    assert layer.activation is not None
    assert layer.result is (layer.activation if clips else layer.node)


def test_an_activation_of_a_layer_that_others_read_is_not_fused() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y: Tensor = net.conv(x)
        return F.relu(y) + y

    layer = captured(Net(forward, conv=nn.Conv2d(4, 4, 1))).layers["conv"]

    assert layer.activation is None
    assert layer.result is layer.node


def test_a_residual_added_in_place_is_an_add() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y: Tensor = net.conv(x)
        y += x
        return F.relu(y, inplace=True)

    network = captured(Net(forward, conv=nn.Conv2d(4, 4, 1)))

    assert "aten.add.Tensor" in targets(network)
    assert not any("_." in target for target in targets(network))


def test_a_value_read_before_it_is_overwritten_keeps_its_value_for_that_reader() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y: Tensor = net.conv(x)
        before = y * 2
        y.relu_()
        return before + y

    captured(Net(forward, conv=nn.Conv2d(4, 4, 1)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.conv(x).flatten(1).relu_(),
        lambda net, x: net.conv(x.relu_()),
        lambda net, x: net.conv(x)[:, 0].add_(1.0),
        lambda net, x: x.view(-1).relu_().sum() + net.conv(x),
    ],
    ids=["view", "input", "slice", "view of the input"],
)
def test_a_write_is_captured_and_spares_the_input(forward: Callable[[Net, Tensor], object]) -> None:
    model, inputs = Net(forward, conv=nn.Conv2d(4, 4, 1)), X.clone()

    network = capture(model, {"x": inputs})

    assert torch.equal(inputs, X)
    torch.testing.assert_close(call(network, {"x": X.clone()}), model(X.clone()), rtol=1e-4, atol=1e-5)


def through_a_slice(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.conv(x)
    y[:, 0].add_(1.0)
    return y


def through_a_view(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.conv(x)
    y.view(-1).relu_()
    return y


def into_a_slice(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.conv(x)
    y[:, 1:, ::2] = y[:, :-1, ::2] * 2.0
    return torch.relu(net.norm(y))


@pytest.mark.parametrize("forward", [through_a_slice, through_a_view, into_a_slice])
def test_a_write_into_a_view_is_captured(forward: Callable[[Net, Tensor], object]) -> None:
    network = captured(Net(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)))

    assert list(network.layers) == ["conv"]
    assert not any("_." in target for target in targets(network))


def test_a_write_that_outlives_the_call_is_refused_with_its_line() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        mean: Tensor = net.norm.running_mean
        mean.add_(1.0)
        return torch.add(net.conv(x), mean[:, None, None])

    with pytest.raises(CaptureError, match=r"cannot be captured.* writes in place"):
        capture(Net(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), {"x": X})


# ---- signatures and outputs


class Point(NamedTuple):
    left: Tensor
    right: Tensor


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: {"logits": y, "features": y + 1},
        lambda y: (y, (y * 2, [y * 3])),
        lambda y: Point(y, y * 2),
        lambda y: [y],
    ],
)
def test_outputs_keep_their_structure(pack: Callable[[Tensor], object]) -> None:
    captured(Net(lambda net, x: pack(net.conv(x)), conv=nn.Conv2d(4, 4, 1)))


class Several(nn.Module):
    """Two images, a keyword-only mask and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        networks.seeded(self)

    def forward(self, left: Tensor, right: Tensor, *, mask: Tensor, gain: float = 2.0) -> tuple[Tensor, Tensor]:
        return self.a(left) + self.b(right) * mask, gain * self.a(right)


def test_several_inputs_and_keyword_only_arguments_are_captured() -> None:
    model = Several()
    batch = Signature.of(model).bind((X, X + 1), {"mask": torch.ones(5, 1, 1, 1)})

    network = capture(model, batch)

    assert names(network) == ["a", "b", "a#2"]
    assert next(form.shape for form in network.inputs if form is not None) == (2, 4, 8, 8)
    for a, b in zip(model(**batch), call(network, batch), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(a, b)


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    model = Several()
    batch = Signature.of(model).bind((X, X), {"mask": torch.ones(5, 1, 1, 1)})

    network = capture(model, batch)

    other = Signature.of(model).bind((X, -X), {"mask": torch.ones(5, 1, 1, 1)})
    for a, b in zip(model(**other), call(network, other), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(a, b)


def test_the_signature_names_every_argument() -> None:
    assert Signature.of(Several()) == Signature(("left", "right"), ("left", "right", "mask"), ("mask", "gain"))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, 2, 3), {}, r"at most 2 positional arguments \(left, right\)\. Got 3"),
        ((1, 2), {"left": 3}, "'left' is given twice"),
        (
            (1, 2),
            {"middle": 3},
            "'middle' is not a parameter of forward. forward takes: left, right, mask, gain",
        ),
        ((1,), {}, r"needs the argument\(s\) right"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(args: tuple[object, ...], kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Signature.of(Several()).bind(args, kwargs)


def test_a_keyword_only_argument_without_a_default_is_required() -> None:
    with pytest.raises(CalibrationError, match="mask"):
        Signature.of(Several()).bind((X, X), {})


def test_a_batch_that_is_no_batch_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"a calibration batch is a tensor, a tuple .* Got str"):
        Signature.of(Several()).batch("image")
    with pytest.raises(CalibrationError, match="needs at least one tensor with a batch axis"):
        rows({"x": 3})


@given(st.integers(1, 12), st.integers(1, 5))
@settings(deadline=None)
def test_a_split_batch_is_the_batch(count: int, size: int) -> None:
    batch: Batch = {
        "x": torch.arange(count),
        "pair": (torch.arange(2 * count).reshape(count, 2), "name"),
        "n": 3,
    }

    pieces = split(batch, size)

    assert all(1 <= rows(piece) <= size for piece in pieces)
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), torch.arange(count))  # type: ignore[misc]
    assert all(piece["n"] == 3 and piece["pair"][1] == "name" for piece in pieces)  # type: ignore[index]


def test_selecting_rows_leaves_other_tensors_alone() -> None:
    table = torch.ones(7)

    chosen = select({"x": X, "table": table}, torch.tensor([3, 0]))

    assert torch.equal(chosen["x"], X[[3, 0]])  # type: ignore[arg-type]
    assert chosen["table"] is table


# ---- dynamic axes, and what cannot be captured


def test_image_sizes_may_change_where_they_are_dynamic() -> None:
    model = Net(lambda net, x: net.conv(x), conv=nn.Conv2d(4, 4, 3, padding=1))

    network = capture(model, {"x": X}, {"x": {2: Dim.AUTO, 3: Dim.AUTO}})

    larger = networks.images(3, seed=0, channels=4, side=13)[:, :, :11]
    torch.testing.assert_close(call(network, {"x": larger}), model(larger))
    form = network.inputs[0]
    assert form is not None
    assert form.dynamic == (0, 2, 3)


def test_dynamic_axes_of_an_unknown_input_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"dynamic names inputs of forward: x. Got y"):
        capture(Net(lambda net, x: net.conv(x), conv=nn.Conv2d(4, 4, 1)), {"x": X}, {"y": {2: Dim.AUTO}})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if y.sum() > 0:  # the line that the error names
            y = y * 2
        return y


def test_control_flow_on_values_is_refused_with_its_line() -> None:
    line = Branching.forward.__code__.co_firstlineno + 2

    with pytest.raises(CaptureError, match=rf"cannot be captured.*test_capture\.py.*line {line}.*if y\.sum\(\) > 0"):
        capture(Branching(), {"x": X})


def test_a_random_network_is_refused() -> None:
    model = Net(lambda net, x: net.conv(x) + torch.rand_like(x), conv=nn.Conv2d(4, 4, 1))

    with pytest.raises(CaptureError, match=r"output 0 .* differs .* no randomness"):
        capture(model, {"x": X})


def test_a_network_that_fixes_its_batch_size_is_refused() -> None:
    model = Net(lambda net, x: net.fc(net.conv(x).reshape(2, 256)), conv=nn.Conv2d(4, 4, 1), fc=nn.Linear(256, 2))

    with pytest.raises(CaptureError, match=r"fails on a batch of 3 rows.*must accept any number of rows on axis 0"):
        capture(model, {"x": X})


def test_a_network_in_half_precision_is_refused() -> None:
    model = Net(lambda net, x: net.conv(x), conv=nn.Conv2d(4, 4, 1)).half()

    with pytest.raises(CaptureError, match=r"parameters must be float32. conv.weight is torch.float16"):
        capture(model, {"x": X.half()})


@pytest.mark.parametrize("training", [True, False])
def test_capturing_leaves_the_model_untouched(training: bool) -> None:
    model = networks.seeded(RenamedResidual()).train(training)
    model.get_submodule("norm1").eval()
    before = copy.deepcopy(model.state_dict())
    flags = {name: module.training for name, module in model.named_modules()}

    capture(model, {"x": networks.images(4, seed=0)})

    assert {name: module.training for name, module in model.named_modules()} == flags
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_captured_network_shares_no_memory_with_the_model() -> None:
    model = Net(lambda net, x: net.conv(x), conv=nn.Conv2d(4, 4, 1))
    network = capture(model, {"x": X})
    before = call(network, {"x": X})

    model.state_dict()["conv.weight"].fill_(0)

    assert torch.equal(call(network, {"x": X}), before)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["graph", "code", "meta", "self", "_out_spec"])
def test_a_module_named_like_a_part_of_a_graph_has_an_underscore(name: str) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(8, 8))
    model.add_module(name, nn.Linear(8, 2))

    assert names(capture(model, {"input": X})) == ["first", f"{name}_"]


# ---- geometry


GEOMETRIES = [
    (Geometry("convolution"), (6, 4, 3, 3)),
    (Geometry("convolution", (2, 1), (1, 0, 2, 1)), (6, 4, 3, 2)),
    (Geometry("convolution", (1, 1), (2, 2, 2, 2), (2, 3)), (6, 4, 2, 2)),
    (Geometry("convolution", (2, 2), (0, 1, 1, 0), (1, 1), 2), (6, 2, 3, 3)),
    (Geometry("convolution", (1, 1), (1, 1, 1, 1), (1, 1), 4), (4, 1, 3, 3)),
]


@pytest.mark.parametrize(("geometry", "shape"), GEOMETRIES)
def test_a_geometry_convolves_like_the_oracle(geometry: Geometry, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = X[:2], torch.randn(shape, generator=generator)

    output = geometry.apply(x, weight, None)

    expected = oracles.convolution(
        x.numpy(),
        weight.numpy(),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    np.testing.assert_allclose(output.numpy(), expected.astype(np.float32), rtol=1e-4, atol=1e-4)


def test_a_shortcut_is_the_operand_that_is_computed_before_the_layer() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        y = net.second(F.relu(net.first(x))) + x
        return net.right(y) + net.left(y)  # type: ignore[no-any-return]

    parts = {name: nn.Conv2d(2, 2, 3, padding=1) for name in ("first", "second", "left", "right")}
    network = capture(networks.Net(forward, **parts), {"x": networks.images(2, 0, channels=2)})

    found = find_shortcuts(network)

    assert set(found) == {"second", "left"}
    assert found["second"].op == "placeholder"
    assert found["left"] is network.layers["right"].node


@pytest.mark.parametrize("join", [lambda y, x: y + 1.0, lambda y, x: y + y, lambda y, x: y * x, lambda y, x: y + x[:1]])
def test_what_is_no_residual_add_of_equal_shapes_has_no_shortcut(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = networks.Net(lambda net, x: join(net.first(x), x), first=nn.Conv2d(2, 2, 3, padding=1))

    assert find_shortcuts(capture(net, {"x": networks.images(3, 0, channels=2)})) == {}
