"""Networks with computed tensors inside: pruned ones, old parametrizations, kept activations."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import calque
import networks
from calque.errors import CaptureError
from calque.network import capture
from calque.network.copies import duplicate

X = networks.images(32, seed=0)


def pruned() -> nn.Module:
    model = networks.small()
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index, no-untyped-call]
    prune.l1_unstructured(model[3], "bias", 0.3)  # type: ignore[index, no-untyped-call]
    prune.ln_structured(model[3], "weight", 0.25, 2, 1)  # type: ignore[index, no-untyped-call]
    prune.l1_unstructured(model[3], "weight", 0.5)  # type: ignore[index, no-untyped-call]
    return model


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = networks.small()
    norm(model[0])  # type: ignore[index]
    return model


class Keeping(nn.Module):
    """Keeps what it computed, in an attribute, a list and an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.features: Tensor | None = None
        self.past: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = F.relu(self.conv(x))
        self.past.append({"features": self.features})
        result: Tensor = self.head(self.features.mean((2, 3)))
        return result


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        pruned,
        lambda: normed(spectral_norm),
        lambda: normed(weight_norm),
        lambda: networks.seeded(Keeping()),
    ],
    ids=["pruned", "spectral norm", "weight norm", "keeping"],
)
def test_a_network_with_computed_tensors_is_captured_and_left_untouched(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    model(X)  # with gradients: what is computed has a history
    before = {name: value.clone() for name, value in model.state_dict().items()}

    network = capture(model, {next(iter(capture_names(model))): X})

    with torch.no_grad():
        torch.testing.assert_close(network.module(X)[0], model(X), rtol=1e-4, atol=1e-5)
    assert len(network.layers) == 2
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def capture_names(model: nn.Module) -> tuple[str, ...]:
    return ("x",) if isinstance(model, Keeping) else ("input",)


class Own(nn.Linear):
    """A linear layer of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_pruned_network_is_loaded_into_its_architecture_before_pruning(tmp_path: Path) -> None:
    model = networks.seeded(nn.Sequential(nn.Flatten(), Own(64, 8), nn.ReLU(), nn.Linear(8, 3)))
    plain = duplicate(model)
    prune.l1_unstructured(model[1], "weight", 0.5)  # type: ignore[index, no-untyped-call]
    q = calque.quantize(model, X, recipe="nearest")
    calque.save(q, tmp_path / "q")

    assert list(q.layers) == ["1", "3"]
    for architecture in (model, plain):
        assert torch.equal(calque.load(tmp_path / "q", architecture)(X), q(X))


def test_rounding_to_nearest_keeps_pruned_weights_zero() -> None:
    model = pruned()

    q = calque.quantize(model, X, bits="w4a4", recipe="nearest", first_last=None)

    for name, layer in q.layers.items():
        assert not layer.codes[model.get_submodule(name).weight == 0].any()
    assert not any("pruned" in note for note in q.report.notes)


def test_the_report_counts_pruned_weights_that_a_fit_moved() -> None:
    model = networks.seeded(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)))
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index, no-untyped-call]
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    x = torch.randn(512, 12, generator=torch.Generator().manual_seed(2)) @ mix

    q = calque.quantize(model, x, bits="w2a8", recipe="fast", first_last=None)

    zero = model[0].weight == 0  # type: ignore[index]
    moved = int((q.layers["0"].codes[zero] != 0).sum())
    assert moved > 0  # correlated inputs: neighbours make up for each other
    expected = f"{moved} of {int(zero.sum())} weights that are zero (pruned) are so no longer, in 0:"
    assert any(note.startswith(expected) for note in q.report.notes)


def test_a_copy_shares_its_weights_where_the_network_does() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight

    copied = duplicate(model)

    assert copied[1].weight is copied[0].weight  # type: ignore[index]
    assert copied[0].weight is not model[0].weight  # type: ignore[index]


def test_what_cannot_be_copied_is_named_with_its_module() -> None:
    model = networks.small()
    model[0].guard = threading.Lock()  # type: ignore[index]

    with pytest.raises(
        CaptureError, match=r"module 0 \(Conv2d\) keeps a lock in 'guard'.*get_submodule\(\"0\"\)\.guard"
    ):
        calque.quantize(model, X, recipe="nearest")
