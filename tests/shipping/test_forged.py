"""Files with a right checksum and wrong contents: refused by name, or equal networks. A part of the campaign."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import networks
from calque.errors import LoadError, SpecError
from calque.pipeline.quantize import quantize
from calque.quantized.model import QuantizedModel
from calque.report import Report
from calque.shipping.saved import load, save
from campaign.forged import Forgery, judge, metadata_forgeries, opened, sealed, tensor_forgeries
from slow import slow


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    return quantize(networks.seeded(networks.Residual()), networks.images(16, seed=0), bits="w4a4", recipe="nearest")


@pytest.fixture(scope="module")
def content(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("true") / "q.safetensors"
    save(quantized, path)
    return path.read_bytes()


def opener(path: Path) -> Callable[[Tensor], Tensor]:
    return load(path, networks.Residual())


def wrong(forgeries: list[Callable[[], Forgery]], quantized: QuantizedModel, path: Path) -> list[str]:
    inputs = networks.images(4, seed=1)
    judged = (judge(forge(), path, opener, inputs, quantized(inputs)) for forge in forgeries)
    return [problem for problem in judged if problem]


def test_a_sealed_file_is_the_true_one(content: bytes, quantized: QuantizedModel, tmp_path: Path) -> None:
    table, tensors = opened(content)

    same = Forgery("nothing", sealed(json.dumps(table), tensors))

    assert wrong([lambda: same], quantized, tmp_path / "q.safetensors") == []
    assert load(tmp_path / "q.safetensors", networks.Residual()).plan == quantized.plan


@pytest.mark.parametrize("count", [60, slow(250)])  # the campaign tries all
def test_metadata_with_one_wrong_field_is_refused_or_changes_nothing(
    content: bytes, quantized: QuantizedModel, tmp_path: Path, count: int
) -> None:
    everything = list(metadata_forgeries(content))
    sample = random.Random(0).sample(everything, count)

    assert wrong(sample, quantized, tmp_path / "q.safetensors") == []


@pytest.mark.parametrize("count", [30, slow(100)])
def test_one_wrong_tensor_is_refused(content: bytes, quantized: QuantizedModel, tmp_path: Path, count: int) -> None:
    everything = list(tensor_forgeries(content))

    assert wrong(random.Random(0).sample(everything, count), quantized, tmp_path / "q.safetensors") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t["grids"]["stem.input"].update(scale=0.0), r"grids\['stem.input'\].scale must be a finite number from"),
        (lambda t, _: t["grids"]["stem.input"].update(scale=1e-45), "scale must be a finite number from"),
        (lambda t, _: t["grids"]["stem.input"].update(scale=0.1), "scale must be a float32 number. Got 0.1"),
        (lambda t, _: t["grids"]["stem.input"].update(scale=0.125), "stem:bias_scale' must be the scale of the layer's input"),
        (lambda t, _: t["grids"]["stem.input"].update(zero_point=256), "zero_point must be an int from 0 to 255. Got 256"),
        (lambda t, _: t["grids"]["conv1.input"].update(zero_point=16), "zero_point must be an int from 0 to 15. Got 16"),
        (lambda t, _: t["grids"]["stem.input"].update(source="void"), "source names 'void', which is nothing in the network"),
        (lambda t, _: t["grids"]["conv1.input"].update(bits=8), r"bits must be 4, as in the plan. Got 8"),
        (lambda t, _: t["layers"]["conv1"].update(bits=0), "layers.conv1.bits must be an int from 2 to 8. Got 0"),
        (lambda t, _: t["layers"]["conv1"].update(bits="8"), "bits must be an int from 2 to 8. Got '8'"),
        (lambda t, _: t["layers"]["conv1"].update(bits=True), "bits must be an int from 2 to 8. Got True"),
        (lambda t, _: t["layers"]["conv1"].update(bits=8), r'bits must be as in the plan \("w4a4"\). Got 8'),
        (lambda t, _: t["layers"]["conv1"].update(shape=[10**6] * 4), r"codes' must be torch.uint8 \[5\d+\]. Got"),
        (lambda t, _: t["layers"]["conv1"].update(shape=[-8, 8, 3, 3]), r"shape\[0\] must be an int from 0 to .*Got -8"),
        (lambda t, _: t["inputs"]["image"].update(shape=[3, 1, 10**6, 10**6]), "inputs.image.shape must be so small"),
        (lambda t, _: t["inputs"]["image"].update(shape=[10**6, 1, 8, 8]), "inputs.image.shape must be of at most 3 rows"),
        (lambda t, _: t["inputs"]["image"].update(dtype="qint3"), "inputs.image.dtype is one of .*. Got 'qint3'"),
        (lambda t, _: t["plan"].update(head="w4a4"), r'head.bits must be as in the plan \("w4a4"\). Got 8'),
        (lambda t, _: t["plan"].pop("conv1"), "layers.conv1 has no entry in the plan"),
        (lambda t, _: t["plan"].update(nothing="a8"), "plan.nothing names nothing in the network"),
        (lambda t, _: t["report"].update(float_size=0), "report.float_size must be an int from 1"),
        (lambda t, _: t["report"]["layers"][0].update(bits="w2a2"), r"report.layers\[0\].bits must be as in the plan"),
        (lambda t, _: t["report"]["layers"][0].update(low=-9.0), r"report.layers\[0\] must be of the grid's range"),
        (lambda t, _: t.update(surplus=1), "metadata has an unknown field 'surplus'"),
        (lambda t, _: t.pop("grids"), "metadata lacks 'grids'"),
        (lambda t, _: t.update(scaled=[["ghost"]]), r"scaled\[0\] names 'ghost'"),
        (lambda t, _: t.update(dynamic={"image": [9]}), "dynamic.image must be a list of axes that the input has"),
        (lambda _, x: x["layer:conv1:scale"].fill_(torch.nan), "'layer:conv1:scale' must be finite and at least .*. Got nan"),
        (lambda _, x: x["layer:conv1:scale"].fill_(torch.inf), "'layer:conv1:scale' must be finite.* Got inf"),
        (lambda _, x: x["layer:conv1:scale"].fill_(-1), "'layer:conv1:scale' must be finite.* Got -1.0"),
        (lambda _, x: x["layer:conv1:scale"].fill_(0), "'layer:conv1:scale' must be finite.* Got 0.0"),
        (lambda _, x: x["layer:conv1:bias"].fill_(2**31 - 1), r"'layer:conv1:bias' must be from -2\^30 to 2\^30"),
        (lambda _, x: x.update({"float:ghost": torch.ones(1)}), "'float:ghost' is a tensor that nothing in the network reads"),
    ],
)  # fmt: skip
def test_the_error_names_the_field_the_rule_and_what_was_received(
    change: Callable[[dict[str, object], dict[str, Tensor]], object], message: str, content: bytes, tmp_path: Path
) -> None:
    table, tensors = opened(content)
    change(table, tensors)
    (tmp_path / "q.safetensors").write_bytes(sealed(json.dumps(table), tensors))

    with pytest.raises(LoadError, match=message) as caught:
        load(tmp_path / "q.safetensors", networks.Residual())

    assert str(tmp_path / "q.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format":1,"format":1}', "has the field 'format' twice"),
        (f'{{"format":{"[" * 100000}{"]" * 100000}}}', "levels deep"),
        (f'{{"format":{"[" * 100}{"]" * 100}}}', "levels deep"),
        (f'{{"format":1{"0" * 6000}}}', "does not parse"),
        ('{"format":1e999}', "has format inf; this version of calque reads 1"),
    ],
)
def test_json_that_no_network_needs_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    try:
        path.write_bytes(sealed(text, {}))
    except (RecursionError, ValueError):  # no checksum can be right for what does not parse
        path.write_bytes(unsealed(text))

    with pytest.raises(LoadError, match=message):
        load(path, networks.Residual())


def unsealed(text: str) -> bytes:
    return safetensors.torch.save({}, {"calque": text})


def test_a_parameter_that_is_not_finite_is_refused_and_a_mask_that_is_infinite_is_not(tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf] * 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head((self.norm(self.body(x)) + self.mask).softmax(-1))
            return y

    path, inputs = tmp_path / "q.safetensors", torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    q = quantize(networks.seeded(Masked()), inputs, recipe="nearest")
    save(q, path)
    assert torch.equal(load(path, Masked())(inputs), q(inputs))
    table, tensors = opened(path.read_bytes())

    for key in ("float:norm.weight", "float:mask"):
        for value in (torch.nan, torch.inf):
            changed = {**tensors, key: torch.full((8,), value)}
            path.write_bytes(sealed(json.dumps(table), changed))
            with pytest.raises(LoadError, match=f"'{key}' must be finite. Got {value}"):
                load(path, Masked())


@pytest.mark.parametrize("value", [None, "x", [1], -0.5, True])
@pytest.mark.parametrize("field", ["seed", "layers", "tensors", "phases", "notes", "finalists", "float_size"])
def test_a_report_with_a_wrong_field_is_refused_by_name(quantized: QuantizedModel, field: str, value: object) -> None:
    table = json.loads(quantized.report.to_json())

    with pytest.raises(SpecError, match=f"report.{field}"):
        Report.from_json(json.dumps({**table, field: value}))
