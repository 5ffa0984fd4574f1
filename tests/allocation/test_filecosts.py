"""A budget on size bounds the file: sums over layers are no less than a plan's prediction, and that no less than the file."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.allocation.filecosts import file_costs
from calque.allocation.filenodes import guessed_operators
from calque.allocation.filesize import file_size
from calque.grid.bits import Placement
from calque.network import Network, capture
from calque.quantized.decisions import decide_choices
from calque.recipe import LIGHT, NEAREST
from slow import slow

TOLERANCE, ROUGH = 1.08, 1000
SMALL_ROUGH = 8000  # bytes: a prediction is generous with operators, of which these networks are made


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.head = nn.Conv2d(8, 32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.deep(F.relu6(self.stem(x))))
        y: Tensor = self.head(F.hardswish(self.point(x)).mean((2, 3)))
        return y


class Attention(nn.Module):
    """A table whose weights may be the head's, positions, a mask of arithmetic on shapes and padding, two outputs."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(32, 16), nn.Embedding(12, 16)
        self.query, self.key, self.value, self.mix = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 32)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        rows, count = words.shape
        x = self.norm(self.words(words) + self.places(torch.arange(count)))
        q, k, v = (f(x).view(rows, count, 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / 8**0.5 + (1 - attention_mask[:, None, None].to(x.dtype)) * -1e4
        causal = torch.arange(count)[:, None] >= torch.arange(count)[None]
        y = (scores.masked_fill(~causal, -1e4).softmax(-1) @ v).transpose(1, 2).reshape(rows, count, 16)
        y = x + self.mix(y)
        return {"a_long_name_of_scores_for_words": self.head(y), "pooled": y.mean(1)}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        result: Tensor = self.head(F.max_pool2d(y, 2).mean((2, 3)))
        return result


class Branches(nn.Module):
    """Two readers of one tensor that other bits would part, a concatenation, a resize, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.one, self.three = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.squeeze(image))
        x = torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)
        y = torch.cat([self.up(x), F.interpolate(x[:, 8:], scale_factor=2)], 1)
        result: Tensor = self.head(F.gelu(y))
        return result


class Mixed(nn.Module):
    """Group and layer norms, pieces, indices, variances, an uneven pool, a permutation, a padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 32), nn.Linear(16 * 9, 4)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.norm(self.stem(x))[:, [3, 1, 0, 2, 7, 6, 5, 4]], (1, 1, 1, 1), mode="reflect")
        y = self.wide(F.layer_norm(x / (x.var((2, 3), keepdim=True) + 1), x.shape[-1:]).permute(0, 2, 3, 1))
        left, right = y.split([16, 16], -1)
        z = F.adaptive_avg_pool2d((left * right.sigmoid()).permute(0, 3, 1, 2), 3)
        first, *others = z.unbind(1)
        result: Tensor = self.head(torch.stack([*others, first], 1).flatten(1))
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.cells(x[:, 0])[0][:, -1])
        return result


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 2, stride=2)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu"), 1
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))
        return result


class LongNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = "a_convolution_whose_name_is_longer_than_most_names_of_modules_that_people_give"
        self.parts = nn.ModuleDict({first: nn.Conv2d(1, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1)})
        self.first, self.c, self.head = first, nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, the_long_name_of_the_only_input_of_this_network: Tensor) -> Tensor:
        x = F.relu(self.parts[self.first](the_long_name_of_the_only_input_of_this_network))
        y: Tensor = self.head(
            (self.parts["b"](x) + self.c(x) + the_long_name_of_the_only_input_of_this_network).mean((2, 3))
        )
        return y


def images() -> list[Tensor]:
    return [networks.images(40, seed=0)]


def sizes() -> list[Tensor]:
    return [networks.images(24, seed=0), networks.images(24, seed=1, side=12)]


def sentences() -> list[dict[str, Tensor]]:
    words = torch.randint(32, (40, 10), generator=torch.Generator().manual_seed(0))
    return [{"words": part, "attention_mask": torch.ones_like(part)} for part in (words, words[:, :7])]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Sequence[object]]]] = {
    "residual": (networks.Residual, images),
    "small": (networks.small, images),
    "depthwise": (Depthwise, images),
    "attention": (Attention, sentences),
    "two tables": (lambda: Attention(tied=False), sentences),
    "twice": (Twice, images),
    "branches": (Branches, images),
    "branches of any size": (Branches, sizes),
    "mixed": (Mixed, images),
    "recurrent": (Recurrent, images),
    "encoder": (Encoder, images),
    "long names": (LongNames, images),
}


SIZED = {("residual", "w3a4"), ("attention", "w4"), ("branches of any size", "w8a8")}
EVERY_SIZE = itertools.product(MODELS, ("w8a8", "w3a4", "w4"))


@pytest.mark.parametrize(("model", "bits"), [case if case in SIZED else slow(*case) for case in EVERY_SIZE])
def test_no_file_is_larger_than_predicted(tmp_path: Path, model: str, bits: str) -> None:
    build, inputs = MODELS[model]
    q = calque.quantize(networks.seeded(build()), inputs(), bits=bits, recipe="nearest")

    actual = calque.export_onnx(q, tmp_path / "model.onnx").stat().st_size

    assert actual <= q.report.file_size <= TOLERANCE * actual + SMALL_ROUGH


CANDIDATES = {
    "integer": ("w8a8", "w4a4", "w2a4"), "other widths": ("w8a8", "w7a8", "w4a6", "w3a3"), "weights alone": ("w8", "w4g16", "w2"),
    "with weights alone": ("w8a8", "w4", "w4a4"),
}  # fmt: skip


@functools.cache
def captured(model: str) -> Network:
    build, inputs = MODELS[model]
    (first, *_) = inputs()
    arguments = first if isinstance(first, dict) else {"image" if model in ("residual", "branches") else "x": first}
    return capture(networks.seeded(build()), arguments, {})


@pytest.mark.parametrize("placement", ["integer", "inputs"])
@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("model", ["residual", "depthwise", "attention", "twice", "branches"])
def test_no_plan_is_predicted_larger_than_its_layers_add_up_to(
    model: str, candidates: str, placement: Placement
) -> None:
    network = captured(model)
    choices, _ = decide_choices(network, bits=CANDIDATES[candidates], override=None, first_last=None)
    by_layer, fixed = file_costs(network, choices, placement)
    free = [name for name in network.layers if name not in network.shared]

    generator = torch.Generator().manual_seed(0)
    uniform = [dict.fromkeys(free, index) for index in range(3)]
    drawn = [{name: int(torch.randint(9, (), generator=generator)) for name in free} for _ in range(40)]
    for picked in itertools.chain(uniform, drawn):
        index = {name: picked[network.shared.get(name, name)] % len(choices[name]) for name in network.layers}
        plan = {name: choices[name][chosen] for name, chosen in index.items()}
        bound = fixed + sum(by_layer[name][chosen] for name, chosen in index.items())
        exact = file_size(network, plan, placement, computed=network.layers)
        assert exact <= bound <= 1.5 * exact + 4000


RUNS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "residual": ("residual", ("w8a8", "w4a4", "w2a4"), "7400B"),
    "depthwise": ("depthwise", ("w8a8", "w4a8", "w4a4"), "4800B"),
    "attention": ("two tables", ("w8a8", "w4a8"), "16kB"),
    "groups": ("attention", ("w8", "w4g16", "w4"), "11kB"),
    "shared weights": ("twice", ("w8a8", "w4a4"), "6400B"),
    "branches": ("branches", ("w8a8", "w8a4", "w4a4"), "8200B"),
}


@pytest.mark.parametrize("run", [run if run in ("depthwise", "shared weights") else slow(run) for run in RUNS])
def test_the_file_of_a_run_keeps_its_budget(tmp_path: Path, run: str) -> None:
    model, candidates, size = RUNS[run]
    build, inputs = MODELS[model]
    budget = calque.Budget(size=size)
    limit = budget.limits({})["size"]

    q = calque.quantize(networks.seeded(build()), inputs(), bits=candidates, budget=budget, recipe=LIGHT)

    assert calque.export_onnx(q, tmp_path / "model.onnx").stat().st_size <= q.report.file_size <= limit
    assert all(q.report.file_size <= each.size <= limit for each in q.report.finalists if each.chosen)
    assert not any("may take" in note for note in q.report.notes)


def test_the_dual_form_makes_the_file_small(tmp_path: Path) -> None:
    found = [
        calque.quantize(
            networks.seeded(Twice()), networks.images(40, seed=0), bits=("w8a8", "w4a8"), recipe=NEAREST,
            budget=calque.Budget(loss=loss, minimize="size"),
        )
        for loss in (0.0, 1e6)
    ]  # fmt: skip

    large, small = (calque.export_onnx(q, tmp_path / f"{index}.onnx").stat().st_size for index, q in enumerate(found))
    assert small < large
    assert found[0].report.file_limit is None


def test_operators_that_nobody_has_measured_are_named_under_a_budget() -> None:
    class Lanczos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(torch.special.i0e(self.one(x.flatten(1))))
            return y

    model, x = networks.seeded(Lanczos()), networks.images(40, seed=0)
    assert guessed_operators(capture(model, {"x": x}, {})) == ["special_i0e"]

    q = calque.quantize(model, x, bits=("w8a8", "w4a8"), budget=calque.Budget(size="9kB"), recipe=NEAREST)
    plain = calque.quantize(model, x, bits="w8a8", recipe=NEAREST)

    assert any("special_i0e" in note and "the budget may be exceeded" in note for note in q.report.notes)
    assert not any("guessed" in note for note in plain.report.notes)
