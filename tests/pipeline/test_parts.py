"""Networks that cannot be captured whole."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.errors import CaptureError, CaptureWarning, SpecError
from networks import Branching, Odd

pytestmark = pytest.mark.filterwarnings("ignore::calque.errors.CaptureWarning")  # one test reads it


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return networks.seeded(Branching())


def test_largest_capturable_modules_are_quantized_in_place(model: nn.Module) -> None:
    x = networks.images(256, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.warns(
        CaptureWarning, match=r"cannot be captured whole.*stem, stages.0, stages.1.head.*if x.mean"
    ) as seen:
        q = calque.quantize(model, x, bits="w4a8", recipe="fast", placement="inputs")

    assert [each.filename for each in seen] == [__file__]
    assert isinstance(q, calque.PartlyQuantized)
    assert list(q.parts) == ["stem", "stages.0", "stages.1.head"]
    assert [str(bits) for bits in q.plan.values()] == ["w8a8", "w4a8", "w4a8", "w8a8"]
    assert list(q.layers) == ["stem.0", "stages.0.0", "stages.0.2", "stages.1.head.linear"]
    text = str(q.report)
    assert "cannot be captured whole" in text
    assert "module stages.1.odd stays float" in text
    assert "module unused is never called" in text
    with torch.no_grad():
        assert (q(x) - model(x)).square().mean() < 0.05 * model(x).var()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parts_are_fitted_behind_the_parts_before_them(model: nn.Module) -> None:
    x = networks.images(32, seed=1)
    q = calque.quantize(model, x, bits="w4a8", recipe="nearest", placement="inputs")
    assert isinstance(q, calque.PartlyQuantized)

    with torch.no_grad():
        behind = q.parts["stem"](x)
    low, high = q.parts["stages.0"].quantizers["0.input"].range
    assert behind.max() * 0.5 < high < behind.max() * 1.1
    assert low == 0


def test_patterns_name_layers_by_their_full_path(model: nn.Module) -> None:
    x = networks.images(32, seed=1)

    q = calque.quantize(model, x, bits="w4a8", recipe="nearest", override={"stages.0.*": None, "*head*": "w3a8"})

    assert str(q.plan["stages.0.0"]) == "float"
    assert str(q.plan["stages.1.head.linear"]) == "w3a8"
    with pytest.raises(SpecError, match="matches no layer"):
        calque.quantize(model, x, override={"nothing": None}, recipe="nearest")


def test_what_needs_the_whole_network_says_so(model: nn.Module, tmp_path: Path) -> None:
    x = networks.images(32, seed=1)
    q = calque.quantize(model, x, recipe="nearest")
    assert isinstance(q, calque.PartlyQuantized)

    for action in (
        lambda: calque.save(q, tmp_path / "q"), lambda: calque.export_onnx(q, tmp_path / "q.onnx"), q.integer
    ):  # fmt: skip
        with pytest.raises(SpecError, match="in parts"):
            action()
    for options in (
        {"budget": calque.Budget(size=0.5), "bits": ("w8a8", "w4a8")}, {"run": tmp_path / "run"}, {"loss": "kl"},
        {"dynamic": {"x": {2: torch.export.Dim.AUTO}}},
    ):  # fmt: skip
        with pytest.raises(CaptureError, match="cannot be captured"):
            calque.quantize(model, x, recipe="nearest", **options)
    part = q.parts["stages.0"]
    with torch.no_grad():
        inputs = q.parts["stem"](x)
    assert calque.verify(calque.export_onnx(part, tmp_path / "part.onnx"), part, inputs).agreement > 0.9


def test_network_of_which_nothing_can_be_captured_ends_in_the_first_reason() -> None:
    with pytest.raises(CaptureError, match="cannot be captured"):
        calque.quantize(Odd(), torch.randn(8, 4), recipe="nearest")


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plus, self.minus = nn.Linear(4, 4), nn.Linear(4, 4)
        self.past = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.plus(x) if x.sum() > 0 else self.minus(x)
        packed = nn.utils.rnn.pack_padded_sequence(y[:, None], torch.ones(len(y)), batch_first=True)
        result: Tensor = self.past(packed)[1][0]
        return result


def test_a_module_that_later_batches_reach_is_quantized_and_a_recurrent_one_listed() -> None:
    x = torch.rand(32, 4)

    q = calque.quantize(networks.seeded(Either()), [x, -x], bits="w8a8", recipe="nearest", placement="inputs")

    assert isinstance(q, calque.PartlyQuantized)
    assert list(q.parts) == ["plus", "minus"]
    assert "module past (GRU) stays float" in str(q.report)
