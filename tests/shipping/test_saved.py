"""Saving and loading: the identity, and one clear error for everything else."""

import copy
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from calque.errors import LoadError
from calque.grid.bits import Placement
from calque.pipeline.quantize import quantize
from calque.quantized.model import QuantizedModel
from calque.recipe import NEAREST, SEQUENTIAL
from calque.run.files import write_whole
from calque.shipping.saved import load, save

QUICK = SEQUENTIAL.to_toml().replace("\nsteps = 250", "\nsteps = 5")


class Mixed(nn.Module):
    """All that stays float: a batch norm behind an add, an embedding, a buffer, a constant; two inputs."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.again = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.words = nn.Embedding(5, width)
        self.head = nn.Linear(width, 3)
        self.register_buffer("gain", torch.tensor([0.5]))

    def forward(self, image: Tensor, word: Tensor, *, bright: bool = False) -> dict[str, Tensor]:
        x = F.relu(self.first(image))
        x = self.norm(self.again(x) + x)
        x = self.again(x) * self.gain + torch.tensor(0.25)
        return {"logits": self.head(x.mean((2, 3)) + self.words(word))}


def words(count: int, seed: int) -> Tensor:
    return torch.randint(5, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def quantized(trained: nn.Module, calibration: Tensor) -> QuantizedModel:
    return quantize(trained, calibration, bits="w4a4", recipe=SEQUENTIAL.parse(QUICK))


@pytest.fixture(scope="module")
def file(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage") / "q.safetensors"
    save(quantized, path)
    return path


def test_a_loaded_network_is_the_saved_one_bit_for_bit(
    quantized: QuantizedModel, file: Path, test_inputs: Tensor
) -> None:
    loaded = load(file, networks.Residual())

    assert torch.equal(loaded(3 * test_inputs), quantized(3 * test_inputs))
    assert loaded.plan == quantized.plan
    assert loaded.report == quantized.report
    theirs = quantized.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("placement", ["integer", "inputs"])
def test_float_layers_constants_dicts_and_repeated_calls_survive(placement: Placement, tmp_path: Path) -> None:
    inputs = {"image": networks.images(32, seed=1), "word": words(32, seed=2)}
    q = quantize(
        networks.seeded(Mixed()),
        inputs,
        bits="w3a5",
        recipe=NEAREST,
        override={"head": None},
        placement=placement,
    )

    save(q, tmp_path / "q.safetensors")
    loaded = load(tmp_path / "q.safetensors", Mixed())

    assert torch.equal(loaded(**inputs)["logits"], q(**inputs)["logits"])
    assert set(loaded.layers) == {"first", "again", "again#2", "words"}


def test_layers_with_the_same_codes_are_stored_once(tmp_path: Path) -> None:
    inputs = {"image": networks.images(32, seed=1), "word": words(32, seed=2)}
    q = quantize(networks.seeded(Mixed()), inputs, recipe="nearest", bits="w8a8")

    save(q, tmp_path / "q.safetensors")

    stored = safetensors.torch.load_file(tmp_path / "q.safetensors")
    assert torch.equal(q.layers["again"].codes, q.layers["again#2"].codes)
    assert "layer:again:codes" in stored
    assert "layer:again#2:codes" not in stored


def test_the_weights_of_the_architecture_are_neither_read_nor_changed(
    quantized: QuantizedModel, file: Path, test_inputs: Tensor
) -> None:
    overflowing = networks.Residual()
    for parameter in overflowing.parameters():
        parameter.data.fill_(1e30)

    loaded = load(file, overflowing)

    assert torch.equal(loaded(test_inputs), quantized(test_inputs))
    assert all((parameter == 1e30).all() for parameter in overflowing.parameters())


def test_saving_a_loaded_network_writes_the_same_bytes(file: Path, tmp_path: Path) -> None:
    save(load(file, networks.Residual()), tmp_path / "again.safetensors")

    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_four_bit_file_is_about_an_eighth_of_the_float_one(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4)
    )
    q = quantize(networks.seeded(network), networks.images(32, seed=0), bits="w4a4", first_last=None, recipe="nearest")

    save(q, tmp_path / "q.safetensors")

    whole = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert os.path.getsize(tmp_path / "q.safetensors") < whole / 8 + 12 * (512 + 512 + 4) + 6000  # METHOD section 3


def test_a_network_with_changing_image_sizes_takes_every_size_after_loading(tmp_path: Path) -> None:
    network = networks.seeded(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
    q = quantize(network, [networks.images(8, seed=0), networks.images(8, seed=1, side=12)], recipe="nearest")
    save(q, tmp_path / "q.safetensors")

    loaded = load(tmp_path / "q.safetensors", copy.deepcopy(network))

    larger = networks.images(3, seed=2, side=17)
    assert torch.equal(loaded(larger), q(larger))


def test_a_loaded_network_is_an_ordinary_module(file: Path, test_inputs: Tensor) -> None:
    loaded = load(file, networks.Residual())

    twin = copy.deepcopy(loaded).to("cpu")
    twin.load_state_dict(loaded.state_dict())

    assert torch.equal(twin(test_inputs), loaded(test_inputs))
    assert torch.equal(loaded(test_inputs[:1]), twin(test_inputs[:1]))


def test_the_metadata_is_json_with_plan_report_placement_seed_and_versions(
    quantized: QuantizedModel, file: Path
) -> None:
    with safetensors.safe_open(file, "pt") as opened:
        table = json.loads(opened.metadata()["calque"])

    assert table["format"] == 1
    assert table["plan"]["head"] == "w8a8"
    assert table["placement"] == "integer"
    assert table["report"]["seed"] == quantized.report.seed
    assert table["versions"]["torch"] == torch.__version__


def test_every_layer_of_another_shape_is_named_in_one_error(file: Path) -> None:
    other = networks.Residual()
    other.conv2 = nn.Conv2d(8, 8, 5, padding=2, bias=False)
    other.head = nn.Linear(12, 7)

    with pytest.raises(LoadError, match=r"conv2 is \[8, 8, 3, 3\] in the file and \[8, 8, 5, 5\].*head is \[4, 12\]"):
        load(file, other)


def test_a_missing_layer_and_other_operators_are_named(file: Path) -> None:
    class Shorter(networks.Residual):
        def forward(self, image: Tensor) -> Tensor:
            x = F.gelu(self.stem_norm(self.stem(image)))
            x = F.relu(self.norm2(self.conv2(x)) + x)
            x = F.relu(self.down(x))
            logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
            return logits

    with pytest.raises(LoadError, match=r"no layer conv1.*1 aten\.gelu\.default too many.*lacks 2 aten\.relu"):
        load(file, Shorter())


def test_the_same_operators_arranged_otherwise_are_refused(file: Path) -> None:
    class Swapped(networks.Residual):
        def forward(self, image: Tensor) -> Tensor:
            x = F.relu(self.stem_norm(self.stem(image)))
            y = F.relu(self.norm2(self.conv2(x)))
            x = F.relu(self.norm1(self.conv1(y)) + x)
            x = F.relu(self.down(x))
            logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
            return logits

    with pytest.raises(LoadError, match=r"layer conv1 .* in the file is layer conv2 .* in the network"):
        load(file, Swapped())


def test_a_network_that_does_not_take_the_stored_inputs_is_refused_by_layer(file: Path) -> None:
    other = networks.Residual()
    other.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    with pytest.raises(LoadError, match=r"layer stem is \[8, 1, 3, 3\] in the file and \[8, 3, 3, 3\]"):
        load(file, other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "is damaged"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "checksum does not fit"),
        (lambda content: content.replace(b"w4a4", b"w4a8", 1), "checksum does not fit"),
        (lambda content: b"PK junk", "not a safetensors file"),
        (lambda content: b"", "not a safetensors file"),
        (lambda content: safetensors.torch.save({"a": torch.ones(1)}), "not one of calque's"),
        (lambda content: safetensors.torch.save({"a": torch.ones(1)}, {"calque": "[]"}), "is damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_clear_error(damage: object, message: str, file: Path, tmp_path: Path) -> None:
    assert callable(damage)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(file.read_bytes()))

    with pytest.raises(LoadError, match=message):
        load(path, networks.Residual())


def test_a_wrong_path_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.safetensors", networks.Residual())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", b"new")

    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "old").read_text() == "old"
