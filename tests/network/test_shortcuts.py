"""What torch's transformer modules compute in eval mode without gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import calque
from calque.network import Network, capture

WIDTH, PLACES = 8, 6

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the model's own


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def layer(*, norm_first: bool = False) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True, norm_first=norm_first)


class Pool(nn.Module):
    """Goes on from all places, padded ones too."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.last = encoder, nn.Linear(WIDTH, 3)
        self.eval()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        result: Tensor = self.last(self.encoder(x, src_key_padding_mask=padding).mean(1))
        return result


class Doubled(nn.TransformerEncoder):
    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(src, src_key_padding_mask=src_key_padding_mask)


class Looped(nn.TransformerEncoder):
    """A forward of its own, which takes no shortcut."""

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for each in self.layers:
            src = each(src, src_key_padding_mask=src_key_padding_mask)
        return src


def padded(rows: int = 4) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(rows, PLACES, dtype=torch.bool)
    padding[::2, 3:] = True
    padding[1, 5:] = True
    return torch.randn(rows, PLACES, WIDTH), padding


def agrees(model: nn.Module, network: Network, x: Tensor, padding: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(network.module(x, padding)[0], model(x, padding), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: nn.TransformerEncoder(layer(), 2),
        lambda: nn.TransformerEncoder(layer(), 1, norm=nn.LayerNorm(WIDTH)),
        lambda: nn.TransformerEncoder(layer(), 1, mask_check=False),
        lambda: nn.TransformerEncoder(layer(), 1, enable_nested_tensor=False),
        lambda: nn.TransformerEncoder(layer(norm_first=True), 1, enable_nested_tensor=False),
        lambda: Doubled(layer(), 1),
        lambda: Looped(layer(), 1),
        layer,
    ],
    ids=["stock", "norm", "unchecked", "padded", "norm first", "doubled", "looped", "layer"],
)  # fmt: skip
def test_padded_places_are_what_the_model_makes_of_them(encoder: object) -> None:
    assert callable(encoder)
    model, (x, padding) = Pool(encoder()), padded()

    network = capture(model, {"x": x, "padding": padding})

    assert network.left_float == tuple(note for note in network.left_float if "layer_norm" in note)
    agrees(model, network, x, padding)


def test_padding_in_front_of_the_values_is_computed_as_the_model_does_for_such_a_batch() -> None:
    model, (x, padding) = Pool(nn.TransformerEncoder(layer(), 1)), padded()
    network = capture(model, {"x": x, "padding": padding})
    in_front = padding.clone()
    in_front[0] = in_front[0].flip(0)

    agrees(model, network, x, in_front)


def test_a_float_padding_mask_is_padding_to_the_shortcut() -> None:
    model, (x, padding) = Pool(nn.TransformerEncoder(layer(), 1)), padded()
    mask = padding * -2.0

    agrees(model, capture(model, {"x": x, "padding": mask}), x, mask)


def test_the_shortcut_that_the_user_turned_off_is_not_imitated() -> None:
    model, (x, padding) = Pool(nn.TransformerEncoder(layer(), 1)), padded()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        agrees(model, capture(model, {"x": x, "padding": padding}), x, padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_row_that_is_padding_whole_is_zero_as_the_model_makes_it() -> None:
    model, (x, padding) = Pool(nn.TransformerEncoder(layer(), 1)), padded(32)
    padding[2] = True

    q = calque.quantize(model, (x, padding), bits="w8a8", recipe="nearest", placement="inputs")

    with torch.no_grad():
        assert torch.isfinite(model(x, padding)).all()
        assert (q(x, padding) - model(x, padding)).square().mean() < 0.01 * model(x, padding).var()


class Biased(nn.Module):
    """A float mask of positions, which the fast path reads as booleans."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = layer(), nn.Linear(WIDTH, 3)
        self.register_buffer("bias", -0.5 * torch.tril(torch.ones(PLACES, PLACES), -1))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.encoder(x, src_mask=self.bias))
        return result


def test_the_report_says_where_the_fast_path_computes_something_else_than_training_did() -> None:
    model, x = Biased(), torch.randn(32, PLACES, WIDTH)

    q = calque.quantize(model, x, recipe="nearest", placement="inputs")

    assert any("fast path for attention" in note for note in q.report.notes)
    with torch.enable_grad():  # no fast path
        expected = model(x).detach()
    assert (q(x) - expected).square().mean() < 0.01 * expected.var()


class Deciding(Pool):
    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return super().forward(x, padding) if x.sum() < 1e9 else x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::calque.errors.CaptureWarning")
def test_the_shortcut_is_imitated_in_a_part() -> None:
    model, (x, padding) = Deciding(nn.TransformerEncoder(layer(), 1)), padded(32)

    q = calque.quantize(model, (x, padding), bits="w8a8", recipe="nearest", placement="inputs")

    assert isinstance(q, calque.PartlyQuantized)
    with torch.no_grad():
        assert (q(x, padding) - model(x, padding)).square().mean() < 0.01 * model(x, padding).var()
