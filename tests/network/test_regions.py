"""Parts of forward under another precision or gradient mode."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.network import Network, capture
from calque.recipe import SEQUENTIAL, AdaQuant
from networks import Net

X = networks.images(16, seed=0)
SHORT = replace(SEQUENTIAL, name="short", fit=AdaQuant(steps=5))  # gradient descent


def parts() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(1, 4, 3), "inner": nn.Conv2d(4, 4, 3), "head": nn.Linear(4, 3)}


def head(net: Net, y: Tensor) -> Tensor:
    logits: Tensor = net.head(y.float().mean((2, 3)))
    return logits


def autocast_off(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.conv(x))
    with torch.autocast("cpu", enabled=False):
        y = F.relu(net.inner(y.float()))
    return head(net, y)


def gradients_on(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.conv(x))
    with torch.enable_grad():
        y = F.relu(net.inner(y))
    return head(net, y)


def one_in_the_other(net: Net, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(True):
        y = F.relu(net.conv(x))
        with torch.no_grad():
            z = net.inner(y)
        y = z + y[:, :, 1:-1, 1:-1]
    return head(net, y)


def written_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    with torch.enable_grad():
        y.relu_()
        y = net.inner(y)
        y[:, 0] = 0.5
    return head(net, y)


@torch.no_grad()
def decorated(net: Net, x: Tensor) -> Tensor:
    return gradients_on(net, x)


REGIONS = [autocast_off, gradients_on, one_in_the_other, written_in_place, decorated]


def same(model: nn.Module, network: Network) -> None:
    with torch.no_grad():
        torch.testing.assert_close(network.module(X)[0], model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward", REGIONS)
def test_layers_in_a_region_are_layers_of_one_flat_graph(forward: Callable[[Net, Tensor], Tensor]) -> None:
    model = Net(forward, **parts())

    network = capture(model, {"x": X})

    assert list(network.layers) == ["conv", "inner", "head"]
    assert network.left_float == ()
    assert not any("wrap_with" in str(node.target) for node in network.nodes())
    same(model, network)


def test_both_results_of_a_region_are_kept() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = net.conv(x)
            return net.head(y.mean((2, 3))), y

    model = Net(forward, **parts())
    network = capture(model, {"x": X})

    with torch.no_grad():
        for expected, received in zip(model(X), network.module(X), strict=True):
            torch.testing.assert_close(received, expected)


def test_a_network_with_a_region_is_saved_and_exported(tmp_path: Path) -> None:
    model = Net(one_in_the_other, **parts())
    q = calque.quantize(model, X, recipe="nearest")

    calque.save(q, tmp_path / "q")

    assert torch.equal(calque.load(tmp_path / "q", model)(X), q(X))
    assert calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, X).agreement == 1.0


def bfloat16(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.relu(net.conv(x))
        z = torch.softmax(y.float(), 1).to(y.dtype)  # the type that y has under autocast
        y = net.inner(y * z)
    return head(net, y)


def test_a_region_of_lower_precision_is_computed_in_float32_and_the_report_says_so() -> None:
    model = Net(bfloat16, **parts())

    q = calque.quantize(model, X, recipe="nearest")

    assert list(q.layers) == ["conv", "inner", "head"]
    assert any("torch.bfloat16; here they are computed in float32" in note for note in q.report.notes)
    with torch.no_grad():
        assert (q(X) - model(X)).square().mean() < 0.01 * model(X).var()


def test_autocast_lowers_values_again_after_a_capture() -> None:
    model = Net(bfloat16, **parts())
    with torch.no_grad():
        before = model(X)
        capture(model, {"x": X})

        assert torch.equal(model(X), before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.conv(X).dtype == torch.bfloat16


def test_autocast_of_another_device_is_not_mentioned() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("xpu", dtype=torch.bfloat16):
            return head(net, net.inner(net.conv(x)))

    assert capture(Net(forward, **parts()), {"x": X}).left_float == ()


@pytest.mark.parametrize(
    "around",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode, torch.enable_grad, torch.no_grad],
)
def test_the_mode_of_the_caller_changes_no_code(around: Callable[[], torch.no_grad]) -> None:
    model = networks.seeded(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    expected = calque.quantize(model, x, bits="w4a8", recipe=SHORT, first_last=None)

    with around():
        q = calque.quantize(model, x + 0, bits="w4a8", recipe=SHORT, first_last=None)

    for name, layer in expected.layers.items():
        assert torch.equal(q.layers[name].codes, layer.codes)
        assert torch.equal(q.layers[name].scale, layer.scale)


def test_a_warning_points_at_the_line_that_called_quantize() -> None:
    with pytest.warns(calque.errors.CalibrationWarning) as seen:
        calque.quantize(networks.small(), X[:8], recipe="fast")

    assert seen[0].filename == __file__


def test_control_flow_is_listed_with_its_weights_and_can_be_saved(tmp_path: Path) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x).mean((2, 3))
        result: Tensor = torch.cond(y.sum() > 0, lambda y: net.head(y), lambda y: net.head(-y), (y,))
        return result

    model = Net(forward, conv=nn.Conv2d(1, 4, 3), head=nn.Linear(4, 3))
    q = calque.quantize(model, X, recipe="nearest")

    assert any("cond" in note and "head.weight" in note for note in q.report.notes)
    calque.save(q, tmp_path / "q")
    assert torch.equal(calque.load(tmp_path / "q", model)(X), q(X))
