"""Encoders: tables, products of activations, padding, channel scales, and the file that comes of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
from calque.calibration.batches import prepare, real_tokens, token_axis, token_masks
from calque.calibration.job import Job
from calque.errors import SpecError
from calque.fitting.channel_scales.smoothing import best_scale, linear_groups, smooth
from calque.fitting.embedding import fit_table
from calque.grid.bits import Bits
from calque.network import Geometry, Signature, capture
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer
from calque.recipe import ACCURATE, FAST, Distillation, Sequential
from text_networks import FREE, HEADS, LENGTH, Encoder, sentences, trained_encoder


@pytest.fixture(scope="module")
def trained() -> Encoder:
    return trained_encoder()


def quantized(model: nn.Module, **options: object) -> QuantizedModel:
    defaults: dict[str, object] = {"bits": "w8a8", "recipe": "fast", "placement": "inputs", "dynamic": FREE}
    return calque.quantize(model, sentences(96, seed=1000), **(defaults | options))  # type: ignore[arg-type]


def decibels(model: nn.Module, q: nn.Module) -> float:
    inputs = sentences(200, seed=2000)
    with torch.no_grad():
        exact, found = model(**inputs), q(**inputs)
    return float(10 * (exact.square().sum() / (exact - found).square().sum()).log10())


def test_attention_is_taken_apart_into_the_same_numbers(trained: Encoder) -> None:
    network = capture(trained, sentences(4, seed=1))

    assert list(network.products) == [f"blocks.{i}.matmul{suffix}" for i in (0, 1) for suffix in ("", "#2")]
    assert not any("attention" in sentence for sentence in network.left_float)
    assert [name for name in network.layers if network.is_table(name)] == ["words", "positions"]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_every_form_of_fused_attention_is_captured(options: dict[str, object]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            heads = 2 if options.get("enable_gqa") else HEADS
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 2 * heads), nn.Linear(8, 2 * heads)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
            y: Tensor = F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
            return y

    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    network = capture(Attention(), {"x": x})  # which compares it with the module

    assert len(network.products) == 2


def test_rows_that_a_mask_leaves_nothing_of_are_zero_as_in_the_fused_operator() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.q(x)[:, None]
            y: Tensor = F.scaled_dot_product_attention(
                q, q, q, attn_mask=mask[:, None, :, None] & mask[:, None, None, :]
            )
            return y

    mask = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])
    capture(Attention(), {"x": torch.randn(3, 3, 4), "mask": mask})


def test_products_of_tables_and_masks_are_no_products() -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.frequencies = nn.Linear(4, 4), nn.Parameter(torch.ones(2, 1))

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1]).float()[None]
            y: Tensor = self.layer(x) + (self.frequencies @ places).sum()
            return y

    assert capture(Angles(), {"x": torch.randn(3, 5, 4)}).products == {}


def test_table_is_rounded_row_by_row() -> None:
    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 50)[:, None]
    errors = []
    for bits in (2, 4, 8):
        fit = fit_table(weight, bits, "least_squares")
        real = fit.codes[0].float() * fit.scale[0][:, None]
        relative = (real - weight).square().sum(1) / weight.square().sum(1)
        errors.append(relative.max().item())
        assert fit.after <= fit.before
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_padding_is_no_calibration_data() -> None:
    batch = sentences(5, seed=0)
    mask = token_masks([batch])[0]
    assert mask is not None
    hidden = torch.randn(5, LENGTH, 8)
    keys = torch.randn(5, HEADS, LENGTH, 2)

    assert torch.equal(next(real_tokens([hidden], [mask])), hidden[mask])
    assert next(real_tokens([keys], [mask])).shape == (int(mask.sum()), HEADS, 2)
    assert token_axis(torch.randn(5, 8), mask) is None
    assert token_masks([{"x": hidden}]) == [None]


@pytest.mark.slow  # padding in a run: test_padding_is_no_calibration_data has the rule
def test_what_stands_in_padding_changes_no_layer(trained: Encoder) -> None:
    clean = sentences(64, seed=1000)
    noisy = {**clean, "input_ids": clean["input_ids"] + (1 - clean["attention_mask"]) * 17}
    options = {"bits": "w4a4", "recipe": "fast", "placement": "inputs"}

    a, b = (calque.quantize(trained, batch, **options) for batch in (clean, noisy))  # type: ignore[arg-type]

    for name, layer in a.layers.items():
        assert torch.equal(layer.codes, b.layers[name].codes), name


def test_channel_scales_take_the_outliers_out(trained: Encoder) -> None:
    plain = replace(FAST, flavour=Sequential())

    with_scales, without = (
        decibels(trained, quantized(trained, bits="w8a8", recipe=recipe)) for recipe in ("fast", plain)
    )

    assert with_scales > without + 5  # at 8 bits the outliers are most of the error; at 4 the weights are


def test_best_scale_leaves_even_channels_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2048, 16, generator=generator), torch.randn(64, 16, generator=generator)

    even = best_scale(rows, [weight], Bits(8, 8))
    assert even is not None
    assert even.max() < 2 * even.min()
    rows[:, 2] *= 50
    weight[:, 2] /= 50
    scale = best_scale(rows, [weight], Bits(8, 8))
    assert scale is not None
    assert scale[2] > 4 * scale.median()


def test_scales_move_into_norms_and_values_where_nothing_else_reads_them() -> None:
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            q, k, v = (part(y).unflatten(-1, (4, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PreNorm()
        with torch.no_grad():
            model.norm.weight[5] = 40.0
            model.v.weight[9] *= 60
    x = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(1))
    q = calque.quantize(model, x, bits="w8a8", recipe="fast", placement="inputs")

    assert q.facts.scaled == ()
    assert not torch.equal(q.graph_module.norm.weight, model.norm.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        assert torch.nn.functional.mse_loss(q(x), model(x)) < 1e-2 * model(x).var()


def test_encoder_to_a_file_and_back(trained: Encoder, tmp_path: Path) -> None:
    q = quantized(trained)
    inputs = sentences(64, seed=2000)

    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", Encoder())
    assert torch.equal(loaded(**inputs), q(**inputs))
    assert q.facts.scaled  # post-norm: the residual add reads the norm, too

    path = calque.export_onnx(q, tmp_path / "q.onnx")
    found = calque.verify(path, q, inputs)
    shorter = sentences(8, seed=3, length=7)
    assert torch.equal(loaded(**shorter), q(**shorter))
    assert calque.verify(path, q, shorter).agreement
    kernels = str(found)
    assert "QLinearMatMul" in kernels or "MatMulIntegerToFloat" in kernels


def test_exact_evaluation_multiplies_codes(trained: Encoder) -> None:
    q = quantized(trained, bits="w4a8")
    inputs = sentences(32, seed=2000)

    exact, simulated = q.integer()(**inputs), q(**inputs)

    assert (exact - simulated).abs().max() < 1e-2 * exact.abs().max()


@pytest.mark.slow  # names of both are in test_names, too
def test_products_and_tables_are_named_in_plans(trained: Encoder) -> None:
    q = quantized(
        trained, bits="w4a4", recipe="nearest", override={"*matmul*": None, "words": "w8a8", "blocks.1.matmul": "a4"}
    )

    assert q.plan["words"] == Bits(8, None)
    assert q.plan["positions"] == Bits(4, None)
    assert q.plan["blocks.0.matmul"] == Bits(None, None)
    assert q.plan["blocks.1.matmul"] == Bits(None, 4)
    assert [name for name in q.quantizers if "matmul" in name] == ["blocks.1.matmul.left", "blocks.1.matmul.right"]
    assert q.plan["blocks.0.query"] == Bits(8, 8)  # the first layer that multiplies
    again = quantized(trained, bits=None, recipe="nearest", plan=q.plan)
    assert torch.equal(again(**sentences(4, seed=0)), q(**sentences(4, seed=0)))
    with pytest.raises(SpecError, match=r"blocks\.0\.matmul"):
        quantized(trained, override={"blocks.0.matmul": "w4a4"})


def test_weights_alone_leave_products_float(trained: Encoder) -> None:
    q = quantized(trained, bits="w4")

    assert q.quantizers == {}
    assert decibels(trained, q) > 10


@pytest.mark.slow
def test_budget_includes_tables(trained: Encoder) -> None:
    bits = ("w8a8", "w4a8", "w3a8")
    q = quantized(trained, bits=bits, budget=calque.Budget(size="52%"))

    assert q.report.file_size <= 0.52 * q.report.float_size
    assert q.plan["words"].activation is None
    assert {q.plan["words"].weight, q.plan["positions"].weight} <= {3, 4, 8}


@pytest.mark.slow
def test_accurate_distills_an_encoder(trained: Encoder) -> None:
    short = replace(ACCURATE, distillation=Distillation(steps=8))
    q = quantized(trained, bits="w4a4", recipe=short)

    assert q.report.distilled is not None
    assert q.report.distilled.after <= q.report.distilled.before


def test_tied_output_layer_keeps_the_codes_of_its_table(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.middle, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(F.relu(self.middle(self.words(ids))))  # type: ignore[no-any-return]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tied()
    ids = torch.randint(30, (64, 5), generator=torch.Generator().manual_seed(0))
    q = calque.quantize(model, ids, bits="w8a8", recipe="fast", placement="inputs")

    assert torch.equal(q.layers["words"].codes, q.layers["head"].codes)
    path = calque.export_onnx(q, tmp_path / "q.onnx")
    assert path.stat().st_size < 30 * 16 * 2 + 20_000
    calque.save(q, tmp_path / "q.safetensors")
    assert torch.equal(calque.load(tmp_path / "q.safetensors", Tied())(ids), q(ids))


def test_table_has_no_bias() -> None:
    codes, scale = torch.zeros(5, 4, dtype=torch.int8), torch.ones(5)
    layer = QuantizedLayer(Geometry("embedding"), codes, scale, torch.zeros(0), None, bits=4)

    assert layer(torch.tensor([[1, 2]])).shape == (1, 2, 4)
    with pytest.raises(SpecError, match=r"for a table"):
        QuantizedLayer(Geometry("embedding"), codes, scale, torch.zeros(5), None, bits=4)


def test_groups_leave_out_tied_layers_and_float_ones(trained: Encoder) -> None:
    network = capture(trained, sentences(4, seed=1))
    choices = {name: (Bits(8, None if name == "head" else 8),) for name in network.layers}

    groups = list(linear_groups(network, choices, "inputs").values())

    assert ("blocks.0.query", "blocks.0.key", "blocks.0.value") in groups
    assert not any("head" in names for names in groups)
    on_grids = list(linear_groups(network, choices, "integer").values())
    assert on_grids == [("blocks.0.output",), ("blocks.0.down",), ("blocks.1.output",), ("blocks.1.down",)]


def test_smoothing_changes_no_output(trained: Encoder) -> None:
    batch = sentences(32, seed=4)
    batches = prepare(batch, Signature.of(trained), torch.device("cpu"))
    network = capture(trained, batches[0])
    job = Job(network, batches)
    scaled, _ = smooth(job, {name: (Bits(4, 4),) for name in network.layers})

    with torch.no_grad():
        found, expected = scaled.module(*batch.values())[0], trained(**batch)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
