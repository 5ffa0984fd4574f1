"""Masks of padding in their several conventions, and inputs that a network does not take."""

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.calibration.batches import token_masks
from calque.errors import CalibrationError

WIDTH, LENGTH = 16, 10


def sentences(count: int = 48) -> tuple[Tensor, Tensor]:
    """Ids with 0 at padding, and 1 where a token is real."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    keep = (torch.arange(LENGTH) < lengths).long()
    return torch.randint(1, 50, (count, LENGTH), generator=generator) * keep, keep


class Attention(nn.Module):
    """One head; padding is told by a large negative number added to the scores, as older encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        scores = self.query(x) @ self.key(x).mT / WIDTH**0.5 + (1 - attention_mask[:, None].float()) * -10000.0
        y: Tensor = self.head(scores.softmax(-1) @ self.value(x))
        return y


@torch.no_grad()
def decibels(model: nn.Module, q: nn.Module, batch: dict[str, Tensor], real: Tensor) -> float:
    exact, found = model(**batch)[real], q(**batch)[real]
    return float(10 * (exact.square().sum() / (exact - found).square().sum()).log10())


def test_a_mask_that_is_added_is_on_no_grid() -> None:
    ids, keep = sentences()
    batch = {"input_ids": ids, "attention_mask": keep}
    model = networks.seeded(Attention())

    q = calque.quantize(model, batch, bits="w8a8", recipe="nearest")  # integer: operands of residual adds have grids

    other = q(ids + 7 * (1 - keep), keep)  # what stands at padding
    assert torch.equal(other[keep == 1], q(ids, keep)[keep == 1])
    assert decibels(model, q, batch, keep == 1) > 25


class Added(nn.Module):
    """Takes the mask as what is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.key, self.value = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 5)
        with torch.no_grad():
            self.words.weight[0] = 30.0  # of padding: far from every other

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        y: Tensor = ((self.key(x)[..., 0] + attention_mask).softmax(-1)[..., None] * self.value(x)).sum(1)
        return y


@pytest.mark.parametrize("lowest", [-10.0, torch.finfo(torch.float32).min, -torch.inf])
def test_a_mask_of_negative_numbers_tells_padding(lowest: float) -> None:
    ids, keep = sentences()
    mask = torch.zeros(keep.shape).masked_fill(keep == 0, lowest)

    assert torch.equal(token_masks([{"attention_mask": mask}])[0], keep == 1)  # type: ignore[arg-type]
    model = networks.seeded(Added())
    q = calque.quantize(model, {"input_ids": ids, "attention_mask": mask}, bits="w8a8", recipe="nearest")
    batch = {"input_ids": ids, "attention_mask": torch.where(keep == 1, 0.0, -torch.inf)}
    assert decibels(model, q, batch, torch.ones(len(ids), dtype=torch.bool)) > 25


def test_a_batch_of_padding_alone_is_refused_by_its_number() -> None:
    ids, keep = sentences(8)
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (keep, keep * 0)]

    with pytest.raises(
        CalibrationError, match=r"every token of calibration batch 1 padding. 1 \(True\) is a real token"
    ):
        calque.quantize(networks.seeded(Attention()), batches, recipe="nearest")


class Stock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
        self.words, self.encoder = nn.Embedding(50, WIDTH), nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        return y


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the model's own, beside which ours is held
def test_the_stock_encoder_is_quantized_with_its_padding_mask() -> None:
    ids, keep = sentences()
    batch = {"input_ids": ids, "attention_mask": keep}
    model = Stock().eval()

    q = calque.quantize(model, batch, bits="w8a8", recipe="nearest", placement="inputs")

    assert not isinstance(q, calque.PartlyQuantized)
    assert model.encoder.use_nested_tensor  # the user's own is as it was
    assert decibels(model, q, batch, keep == 1) > 25


class Means(nn.Module):
    """Divides by a size that is a number once captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)).sum(1) / x.shape[1])
        return y


def test_a_size_that_was_fixed_at_capture_is_refused_elsewhere() -> None:
    x, model = torch.randn(32, 12, WIDTH), networks.seeded(Means())

    fixed = calque.quantize(model, x, recipe="nearest", placement="inputs")
    free = calque.quantize(model, [x, x[:, :5]], recipe="nearest", placement="inputs")

    assert fixed(x[:3]).shape == free(x[:3, :7]).shape
    with pytest.raises(ValueError, match=r"axis 1 of x was captured as 12. Got 7"):
        fixed(x[:, :7])
    with pytest.raises(ValueError, match=r"x was captured with 3 axes. Got 2"):
        fixed(x[:, 0])


@pytest.mark.parametrize(
    "x", [torch.randn(8, 12, WIDTH + 1), torch.randn(8, 12, WIDTH).double()], ids=["width", "type"]
)
def test_inputs_that_the_model_itself_refuses_are_told_so(x: Tensor) -> None:
    with pytest.raises(CalibrationError, match="the model itself fails on the calibration inputs: RuntimeError: mat1"):
        calque.quantize(networks.seeded(Means()), x, recipe="nearest")


def test_a_mask_that_is_no_number_is_refused() -> None:
    ids, keep = sentences()
    mask = torch.zeros(keep.shape)
    mask[3, 0] = torch.nan

    with pytest.raises(CalibrationError, match="calibration inputs must be finite"):
        calque.quantize(networks.seeded(Added()), {"input_ids": ids, "attention_mask": mask}, recipe="nearest")
