import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.calibration.execution import execute
from calque.calibration.losses import Loss, kl, mse
from calque.calibration.rows import Rows, alike, draw, hold_out, join
from calque.correction.biases import tune_biases
from calque.correction.gradients import loss_gradients
from calque.errors import SpecError
from calque.gains import Tuned
from calque.network import Batch
from calque.quantized.learnable import LearnableBias, LearnableScale
from calque.quantized.model import QuantizedModel
from calque.settings import Moving, Optimizer, Tuning

ADAM = Tuning("adam", steps=40, rows=32, rate=1e-2, parameters="biases")
PLENTY = 10**9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def coarse(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    return calque.quantize(trained, calibration, bits="w2a4", recipe="nearest")


@pytest.fixture(scope="module")
def batches(calibration: Tensor) -> list[Batch]:
    return [{"image": part} for part in networks.pieces(calibration, 50)]


@pytest.fixture(scope="module")
def references(trained: networks.Residual, calibration: Tensor) -> list[list[Tensor]]:
    with torch.no_grad():
        return [[trained(part)] for part in networks.pieces(calibration, 50)]


def tuned(
    model: QuantizedModel,
    batches: list[Batch],
    references: Sequence[Sequence[Tensor]],
    tuning: Tuning = ADAM,
    loss: Loss = mse,
    *,
    memory: int = PLENTY,
    seed: int = 0,
) -> tuple[QuantizedModel, Tuned]:
    """A tuned copy of the model."""
    result = copy.deepcopy(model)
    found = tune_biases(
        result.graph_module, batches, references, loss, tuning, memory=memory, generator=generator(seed),
        on_step=lambda step, value: None,
    )  # fmt: skip
    return result, found


def biases(model: QuantizedModel) -> dict[str, Tensor]:
    return {name: layer.real_bias for name, layer in model.layers.items()}


def same_biases(one: QuantizedModel, other: QuantizedModel) -> bool:
    return all(torch.equal(bias, biases(other)[name]) for name, bias in biases(one).items())


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """Relative squared error of the outputs."""
    return mse([one(inputs)], [other(inputs)]).item()


@pytest.mark.parametrize("parameters", ["biases", "scales"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_codes_and_grids_stay_and_weight_scales_move_only_where_asked(
    coarse: QuantizedModel,
    batches: list[Batch],
    references: list[list[Tensor]],
    optimizer: Optimizer,
    parameters: Moving,
) -> None:
    tuning = replace(ADAM, optimizer=optimizer, parameters=parameters)

    result, found = tuned(coarse, batches, references, tuning)

    assert found.after < found.before
    assert not same_biases(result, coarse)
    for name, layer in result.layers.items():
        before = coarse.layers[name]
        assert torch.equal(layer.codes, before.codes)
        assert torch.equal(layer.scale, before.scale) == (parameters == "biases")
        assert layer.bias.dtype == torch.int32
    for name, quantizer in result.quantizers.items():
        assert torch.equal(quantizer.scale, coarse.quantizers[name].scale)
        assert torch.equal(quantizer.zero_point, coarse.quantizers[name].zero_point)


def test_a_tuned_scale_keeps_the_bias_on_the_accumulators_grid(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    result, _ = tuned(coarse, batches, references, replace(ADAM, parameters="scales"))

    for name, layer in result.layers.items():
        before = coarse.layers[name]
        assert layer.bias_scale is not None
        assert before.bias_scale is not None
        input_scale = before.bias_scale / before.scale
        torch.testing.assert_close(layer.bias_scale, input_scale * layer.scale, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("parameters", ["biases", "scales"])
def test_tuning_brings_inputs_that_it_never_saw_closer_to_the_float_network(
    coarse: QuantizedModel,
    trained: networks.Residual,
    batches: list[Batch],
    references: list[list[Tensor]],
    test_inputs: Tensor,
    parameters: Moving,
) -> None:
    result, found = tuned(coarse, batches, references, replace(ADAM, steps=100, parameters=parameters))

    assert found.after < 0.5 * found.before
    assert distance(trained, result, test_inputs) < 0.5 * distance(trained, coarse, test_inputs)


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 50.0), ("sgd", 1e4)])
def test_on_held_out_inputs_the_result_is_never_worse_even_at_an_absurd_rate(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]], optimizer: Optimizer, rate: float
) -> None:
    result, found = tuned(coarse, batches, references, replace(ADAM, optimizer=optimizer, rate=rate))

    assert found == Tuned(found.before, found.before, 0)
    assert same_biases(result, coarse)


def test_the_reported_losses_are_those_of_the_shipped_network_on_the_last_fifth(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]], calibration: Tensor
) -> None:
    result, found = tuned(coarse, batches, references, ADAM, kl)

    whole = torch.cat([reference[0] for reference in references])
    held_out = len(calibration) // 5
    for model, reported in ((coarse, found.before), (result, found.after)):
        with torch.no_grad():
            expected = kl([whole[-held_out:]], [model(calibration[-held_out:])])
        assert reported == pytest.approx(expected.item(), rel=1e-4)


def test_a_planted_bias_error_is_mostly_removed(
    trained: networks.Residual,
    calibration: Tensor,
    batches: list[Batch],
    references: list[list[Tensor]],
    test_inputs: Tensor,
) -> None:
    planted = calque.quantize(trained, calibration, bits="w8a8", recipe="nearest")
    clean = distance(trained, planted, test_inputs)
    for layer in planted.layers.values():
        assert layer.bias_scale is not None
        spread = 0.3 * (layer.real_bias.std() / layer.bias_scale)
        layer.bias += (spread * torch.randn(len(layer.bias), generator=generator())).to(torch.int32)
    ruined = distance(trained, planted, test_inputs)

    result, _ = tuned(planted, batches, references, replace(ADAM, steps=200))

    assert ruined > 20 * clean
    assert distance(trained, result, test_inputs) < 0.05 * ruined


def test_the_same_seed_gives_the_same_biases_and_another_one_others(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    first, again = (tuned(coarse, batches, references)[0] for _ in range(2))
    other, _ = tuned(coarse, batches, references, seed=1)

    assert same_biases(first, again)
    assert not same_biases(first, other)


@pytest.mark.parametrize(
    "change", [{"optimizer": "sgd"}, {"steps": 41}, {"rows": 31}, {"rate": 1.1e-2}, {"parameters": "scales"}], ids=str
)
def test_each_setting_changes_the_biases(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]], change: dict[str, object]
) -> None:
    plain, _ = tuned(coarse, batches, references)
    changed, _ = tuned(coarse, batches, references, Tuning(**{**settings(ADAM), **change}))  # type: ignore[arg-type]

    assert not same_biases(plain, changed)


def settings(tuning: Tuning) -> dict[str, object]:
    return {name: getattr(tuning, name) for name in ("optimizer", "steps", "rows", "rate", "parameters")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "optimizer is one of adam, sgd. Got 'lion'"),
        ({"parameters": "codes"}, "parameters is one of biases, scales. Got 'codes'"),
        ({"steps": -1}, "steps must be an int from 1 to 1,000,000. Got -1"),
        ({"rows": 0}, "rows must be an int from 1 to 65,536. Got 0"),
        ({"steps": 10**30}, "Tuning.steps must be an int from 1 to 1,000,000. Got an int of about"),
        ({"rows": 10**9}, "Tuning.rows must be an int from 1 to 65,536. Got 1000000000"),
        ({"rate": 1e9}, "Tuning.rate must be .* to 1,000,000. Got 1000000000.0"),
        ({"rate": 0.0}, "rate must be a finite number from 1e-12 to 1,000,000. Got 0.0"),
        ({"rate": math.nan}, "rate must be a finite number from 1e-12 to 1,000,000. Got nan"),
        ({"rate": True}, "rate must be a finite number from 1e-12 to 1,000,000. Got True"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Tuning(**{**settings(ADAM), **change})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def smooth(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    """Only weights are quantized: the outputs are smooth in the biases."""
    return calque.quantize(trained, calibration, bits="w2", recipe="nearest")


def test_a_biass_gradient_is_the_difference_quotient_where_nothing_is_rounded(
    smooth: QuantizedModel, trained: networks.Residual, calibration: Tensor
) -> None:
    target = trained(calibration).detach()
    model = copy.deepcopy(smooth).double()
    graph = model.graph_module
    nodes = list(graph.graph.nodes)
    twins = {name: LearnableBias(layer, torch.ones_like(layer.scale)) for name, layer in model.layers.items()}

    def loss() -> Tensor:
        output: Tensor = execute(graph, nodes[1:], {nodes[0]: calibration.double()}, twins)[0]
        error: Tensor = (output - target).square().mean()
        return error

    leaves = [twin.leaves()["bias"] for twin in twins.values()]
    gradients = torch.autograd.grad(loss(), leaves)

    step = 1e-6
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for channel in range(len(leaf)):
            with torch.no_grad():
                leaf[channel] += step
                above = loss()
                leaf[channel] -= 2 * step
                below = loss()
                leaf[channel] += step
            assert gradient[channel].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("loss", [kl, mse])
@pytest.mark.parametrize("size", [1, 7, 20, 31])
def test_gradients_do_not_depend_on_how_many_rows_are_executed_at_a_time(
    smooth: QuantizedModel, trained: networks.Residual, calibration: Tensor, loss: Loss, size: int
) -> None:
    inputs = calibration[:32]
    rows = Rows([inputs], [trained(inputs).detach()], 32)
    nodes = list(smooth.graph_module.graph.nodes)
    layers = {name: LearnableScale(layer, torch.ones_like(layer.scale)) for name, layer in smooth.layers.items()}
    leaves = [leaf for layer in layers.values() for leaf in layer.leaves().values()]

    def outputs(inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(execute(smooth.graph_module, nodes[1:], {nodes[0]: inputs[0]}, layers))

    value, whole = loss_gradients(outputs, rows, loss, leaves, size=32)
    pieced, parts = loss_gradients(outputs, rows, loss, leaves, size=size)

    assert pieced == pytest.approx(value, rel=1e-5)
    for one, other in zip(whole, parts, strict=True):  # float32 sums of another order
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_little_memory_gives_nearly_the_same_biases(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    few = replace(ADAM, steps=8)
    whole, _ = tuned(coarse, batches, references, few)
    pieced, _ = tuned(coarse, batches, references, few, memory=1)

    for name, bias in biases(whole).items():
        moved = (bias - biases(coarse)[name]).abs().max()
        assert (bias - biases(pieced)[name]).abs().max() < 0.05 * moved + 1e-6


def test_the_stored_bias_codes_are_what_evaluates(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]], test_inputs: Tensor
) -> None:
    result, _ = tuned(coarse, batches, references)

    with torch.no_grad():
        simulated, exact = result(test_inputs), result.integer()(test_inputs)
    torch.testing.assert_close(simulated, exact, rtol=1e-4, atol=1e-4)


def test_inputs_of_several_sizes_are_tuned_on(trained: networks.Residual) -> None:
    parts: list[Tensor] = [networks.images(20, seed=side, side=side) for side in (8, 10, 12)]
    model = calque.quantize(trained, parts, bits="w2a4", recipe="nearest")
    with torch.no_grad():
        targets = [[trained(part)] for part in parts]

    _, found = tuned(model, [{"image": part} for part in parts], targets)

    assert found.after < found.before


def test_with_fewer_than_five_inputs_nothing_is_tuned(
    coarse: QuantizedModel, trained: networks.Residual, calibration: Tensor
) -> None:
    few = calibration[:4]

    result, found = tuned(coarse, [{"image": few}], [[trained(few).detach()]])

    assert found == Tuned(found.before, found.before, 0)
    assert found.before > 0
    assert same_biases(result, coarse)


def disagreement(reference: Sequence[Tensor], output: Sequence[Tensor]) -> Tensor:
    return (reference[0].argmax(1) != output[0].argmax(1)).float().mean()


@pytest.mark.parametrize("memory", [PLENTY, 1])
def test_a_loss_without_a_gradient_is_an_error(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]], memory: int
) -> None:
    with pytest.raises(SpecError, match="the loss has no gradient"):
        tuned(coarse, batches, references, ADAM, disagreement, memory=memory)


def test_a_loss_that_is_not_finite_at_the_start_is_an_error(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    with pytest.raises(SpecError, match="the loss is nan on the held-out inputs before any tuning"):
        tuned(coarse, batches, references, ADAM, lambda reference, output: output[0].mean() * math.nan)


def test_a_loss_that_becomes_infinite_ends_the_descent_and_keeps_the_best(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    calls: list[int] = []

    def breaks_at_step_20(reference: Sequence[Tensor], output: Sequence[Tensor]) -> Tensor:
        calls.append(1)
        return mse(reference, output) * (math.inf if output[0].requires_grad and sum(calls) > 25 else 1.0)

    _, found = tuned(coarse, batches, references, ADAM, breaks_at_step_20)

    assert 0 < found.steps < 30
    assert found.after < found.before


def test_an_interrupted_tuning_leaves_the_best_biases_so_far(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    model = copy.deepcopy(coarse)

    def stop(step: int, value: float) -> None:
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_biases(
            model.graph_module, batches, references, mse, ADAM, memory=PLENTY, generator=generator(), on_step=stop
        )

    held_out = [reference[0] for reference in references][-1]
    with torch.no_grad():
        inputs = batches[-1]["image"]
        assert mse([held_out], [model(inputs)]) < mse([held_out], [coarse(inputs)])


def test_the_callers_gradient_mode_and_tensors_are_left_alone(
    coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    with torch.no_grad():
        under_no_grad, _ = tuned(coarse, batches, references)
        assert not torch.is_grad_enabled()
    result, _ = tuned(coarse, batches, references)

    assert torch.is_grad_enabled()
    assert same_biases(result, under_no_grad)
    tensors = [*result.buffers(), *result.parameters(), *[reference[0] for reference in references]]
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in tensors)


def test_every_step_is_told_once(coarse: QuantizedModel, batches: list[Batch], references: list[list[Tensor]]) -> None:
    told: list[tuple[int, float]] = []

    tune_biases(
        copy.deepcopy(coarse).graph_module, batches, references, mse, replace(ADAM, steps=5), memory=PLENTY,
        generator=generator(), on_step=lambda step, value: told.append((step, value)),
    )  # fmt: skip

    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    assert all(0 < value < 1 for _, value in told)


def test_a_network_whose_inputs_are_float_keeps_float_biases(
    trained: networks.Residual, calibration: Tensor, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    model = calque.quantize(trained, calibration, bits="w2", recipe="nearest")

    result, found = tuned(model, batches, references, replace(ADAM, parameters="scales"))

    assert found.after < 0.5 * found.before
    assert all(layer.bias.dtype == torch.float32 and layer.bias_scale is None for layer in result.layers.values())


def parts_of(sizes: list[int]) -> list[Rows]:
    inputs = torch.arange(float(sum(sizes)))[:, None]
    return [Rows([part], [10 * part], len(part)) for part in networks.pieces(inputs, sizes)]


def test_the_last_fifth_is_held_out_across_batches() -> None:
    inputs = torch.arange(23.0)[:, None]
    batches: list[Batch] = [{"x": part, "flag": 3} for part in networks.pieces(inputs, [9, 9, 2, 3])]
    references = [[10 * part] for part in networks.pieces(inputs, [9, 9, 2, 3])]

    fitted, held_out = hold_out(batches, references)

    assert [part.count for part in fitted] == [9, 9, 1]
    assert [part.count for part in held_out] == [1, 3]
    assert torch.equal(join(held_out).inputs[0], inputs[19:])
    assert torch.equal(join(held_out).references[0], 10 * inputs[19:])
    assert join(held_out).inputs[1] == 3


def test_drawn_rows_are_distinct_and_keep_their_references() -> None:
    rows = draw(alike(parts_of([9, 4, 7])), 12, generator())

    assert rows.count == 12
    assert len(rows.inputs[0].unique()) == 12
    assert torch.equal(rows.references[0], 10 * rows.inputs[0])


def test_rows_of_several_shapes_are_drawn_from_one_group_in_proportion() -> None:
    wide = Rows([torch.zeros(30, 2)], [torch.zeros(30, 1)], 30)
    groups = alike([*parts_of([5, 5]), wide])
    draws = [draw(groups, 4, source) for source in [generator()] for _ in range(400)]

    shares = sum(rows.inputs[0].shape[1] == 2 for rows in draws) / 400

    assert len(groups) == 2
    assert shares == pytest.approx(0.75, abs=0.07)  # 30 of 40; the standard deviation is 0.02


def test_rows_that_share_a_tensor_without_rows_are_never_mixed() -> None:
    masked = [Rows([part.inputs[0], torch.ones(2, 2)], part.references, part.count) for part in parts_of([5, 6])]

    groups = alike(masked)

    assert [len(group) for group in groups] == [1, 1]
    assert draw(groups, 3, generator()).inputs[1].shape == (2, 2)
