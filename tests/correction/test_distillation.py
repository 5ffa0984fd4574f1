import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.calibration.losses import Loss, kl, mse
from calque.calibration.rows import Rows
from calque.correction.distillation import CHECKS, distill
from calque.correction.mixture import can_mix, mixed
from calque.errors import SpecError
from calque.gains import Distilled
from calque.network import Batch
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import Quantizer
from calque.recipe import ACCURATE, FAST, NEAREST, Recipe
from calque.report import Report
from calque.settings import Distillation, RelativeRates, Tuning

RATES = RelativeRates(weight=0.05, weight_scale=3e-3, bias=3e-3, activation_scale=3e-3, zero_point=1e-2)
HOW = Distillation(steps=40, rows=16, mixup=0.5, rates=RATES)
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


class Student:
    """What `distill` needs besides what a test changes."""

    def __init__(self, teacher: nn.Module, batches: list[Batch], references: Sequence[Sequence[Tensor]]):
        self.teacher, self.batches, self.references = teacher, batches, references
        self.told: list[tuple[int, int]] = []

    def distilled(
        self,
        model: QuantizedModel,
        how: Distillation = HOW,
        loss: Loss = mse,
        *,
        memory: int = PLENTY,
        seed: int = 0,
        fixed_codes: Sequence[str] = (),
    ) -> tuple[QuantizedModel, Distilled]:
        """A distilled copy of the model."""
        result = copy.deepcopy(model)
        found = distill(
            result.graph_module, lambda inputs: [self.teacher(*inputs)], self.batches, self.references, loss, how,
            fixed_codes=fixed_codes, memory=memory, generator=generator(seed),
            on_step=lambda step, steps: self.told.append((step, steps)),
        )  # fmt: skip
        return result, found


@pytest.fixture
def student(trained: networks.Residual, batches: list[Batch], references: list[list[Tensor]]) -> Student:
    return Student(trained, batches, references)


def same(one: QuantizedModel, other: QuantizedModel) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in states)


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """Relative squared error of the outputs."""
    return mse([one(inputs)], [other(inputs)]).item()


def test_inputs_that_it_never_saw_come_closer_to_the_float_network(
    student: Student, coarse: QuantizedModel, trained: networks.Residual, test_inputs: Tensor
) -> None:
    result, found = student.distilled(coarse, replace(HOW, steps=80))

    assert found.after < 0.5 * found.before
    assert distance(trained, result, test_inputs) < 0.5 * distance(trained, coarse, test_inputs)


def test_codes_scales_biases_and_activation_grids_all_move(student: Student, coarse: QuantizedModel) -> None:
    result, _ = student.distilled(coarse)

    for name, layer in result.layers.items():
        before = coarse.layers[name]
        assert not torch.equal(layer.scale, before.scale)
        assert not torch.equal(layer.bias, before.bias)
    assert any(not torch.equal(layer.codes, coarse.layers[name].codes) for name, layer in result.layers.items())
    for name, quantizer in result.quantizers.items():
        assert quantizer.scale != coarse.quantizers[name].scale


def test_every_bias_stays_on_the_accumulators_grid(student: Student, coarse: QuantizedModel) -> None:
    result, _ = student.distilled(coarse)

    for node in result.graph_module.graph.nodes:
        layer = result.layers.get(str(node.target))
        if layer is not None:
            grid = (
                result.graph_module.get_submodule(str(node.args[0].target))
                if node.args[0].op == "call_module"
                else None
            )
            assert layer.bias_scale is not None
            if isinstance(grid, Quantizer):
                torch.testing.assert_close(layer.bias_scale, grid.scale * layer.scale, rtol=1e-6, atol=0.0)


def test_the_simulation_is_still_the_integer_network(
    student: Student, coarse: QuantizedModel, test_inputs: Tensor
) -> None:
    result, _ = student.distilled(coarse)

    with torch.no_grad():
        torch.testing.assert_close(result(test_inputs), result.integer()(test_inputs), rtol=1e-4, atol=1e-4)


def test_codes_of_layers_that_share_their_weights_stay(student: Student, coarse: QuantizedModel) -> None:
    result, _ = student.distilled(coarse, fixed_codes=["conv1"])

    assert torch.equal(result.layers["conv1"].codes, coarse.layers["conv1"].codes)
    assert not torch.equal(result.layers["conv1"].scale, coarse.layers["conv1"].scale)


def test_on_held_out_inputs_the_result_is_never_worse_even_at_an_absurd_rate(
    student: Student, coarse: QuantizedModel
) -> None:
    absurd = RelativeRates(100.0, 10.0, 100.0, 10.0, 100.0)

    result, found = student.distilled(coarse, replace(HOW, rates=absurd))

    assert (found.after, found.kept) == (found.before, 0)
    assert same(result, coarse)


def test_without_mixtures_the_reported_losses_are_those_of_the_last_fifth(
    student: Student, coarse: QuantizedModel, calibration: Tensor, references: list[list[Tensor]]
) -> None:
    result, found = student.distilled(coarse, replace(HOW, mixup=0.0), loss=kl)

    held_out = len(calibration) // 5
    target = torch.cat([reference[0] for reference in references])[-held_out:]
    for model, reported in ((coarse, found.before), (result, found.after)):
        with torch.no_grad():
            assert reported == pytest.approx(kl([target], [model(calibration[-held_out:])]).item(), rel=1e-4)


def test_the_same_seed_gives_the_same_network_and_another_one_another(student: Student, coarse: QuantizedModel) -> None:
    first, again = (student.distilled(coarse)[0] for _ in range(2))
    other, _ = student.distilled(coarse, seed=1)

    assert same(first, again)
    assert not same(first, other)


def test_minutes_become_steps_whose_number_reproduces_the_run(student: Student, coarse: QuantizedModel) -> None:
    timed, found = student.distilled(coarse, replace(HOW, steps=0, minutes=0.02))
    counted, again = student.distilled(coarse, replace(HOW, steps=found.steps))

    assert found.steps > 1
    assert found.seconds < 3 * 60 * 0.02  # a busy machine
    assert (again.before, again.after, again.kept) == (found.before, found.after, found.kept)
    assert same(timed, counted)


def test_a_time_that_is_too_short_for_a_step_takes_one(student: Student, coarse: QuantizedModel) -> None:
    _, found = student.distilled(coarse, replace(HOW, steps=0, minutes=1e-6))

    assert found.steps == 1


def test_every_step_is_told_once(student: Student, coarse: QuantizedModel) -> None:
    student.distilled(coarse, replace(HOW, steps=7))

    assert student.told == [(step, 7) for step in range(1, 8)]


def test_little_memory_gives_nearly_the_same_gradients(student: Student, coarse: QuantizedModel) -> None:
    small = RelativeRates(1e-3, 1e-3, 1e-3, 1e-3, 1e-3)
    one_step = replace(HOW, steps=1, mixup=0.0, rates=small)
    whole, found = student.distilled(coarse, one_step)
    pieced, again = student.distilled(coarse, one_step, memory=1)

    # Adam's first step is the sign of the gradient: the same but for gradients that are nearly zero
    assert again.after == pytest.approx(found.after, rel=0.05)
    assert whole.layers.keys() == pieced.layers.keys()


def test_an_interrupted_distillation_leaves_the_best_network_so_far(
    coarse: QuantizedModel, trained: networks.Residual, batches: list[Batch], references: list[list[Tensor]]
) -> None:
    model = copy.deepcopy(coarse)

    def stop(step: int, steps: int) -> None:
        if step == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(
            model.graph_module, lambda inputs: [trained(*inputs)], batches, references, mse, HOW,
            fixed_codes=(), memory=PLENTY, generator=generator(), on_step=stop,
        )  # fmt: skip

    assert 40 * CHECKS[0] < 35
    inputs = batches[-1]["image"]
    assert isinstance(inputs, Tensor)
    with torch.no_grad():
        assert mse(references[-1], [model(inputs)]) < mse(references[-1], [coarse(inputs)])


def test_a_loss_that_becomes_infinite_ends_the_descent(student: Student, coarse: QuantizedModel) -> None:
    calls: list[int] = []

    def breaks(reference: Sequence[Tensor], output: Sequence[Tensor]) -> Tensor:
        calls.append(int(output[0].requires_grad))
        return mse(reference, output) * (math.inf if output[0].requires_grad and sum(calls) > 30 else 1.0)

    _, found = student.distilled(coarse, loss=breaks)

    assert 0 < found.kept < 30
    assert max(step for step, _ in student.told) == 30


def test_a_loss_that_is_not_finite_at_the_start_is_an_error(student: Student, coarse: QuantizedModel) -> None:
    with pytest.raises(SpecError, match="the loss is nan on the held-out inputs before distillation"):
        student.distilled(coarse, loss=lambda reference, output: output[0].mean() * math.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minutes": -1}, "minutes must be a finite number from 0 to 10,080. Got -1"),
        ({"minutes": math.inf}, "minutes must be a finite number from 0 to 10,080. Got inf"),
        ({"minutes": True}, "minutes must be a finite number from 0 to 10,080. Got True"),
        ({"steps": -1}, "steps must be an int from 0 to 1,000,000. Got -1"),
        ({"rows": 0}, "rows must be an int from 1 to 65,536. Got 0"),
        ({"minutes": 10**6}, "Distillation.minutes must be .* to 10,080. Got 1000000"),
        ({"steps": 10**30}, "Distillation.steps must be .* to 1,000,000. Got an int of about"),
        ({"rows": 10**9}, "Distillation.rows must be .* to 65,536. Got 1000000000"),
        ({"mixup": 1.5}, "mixup must be a finite number from 0 to 1. Got 1.5"),
        ({"loss": "best"}, "loss is one of outputs, run, kl, mse. Got 'best'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(HOW, **change)  # type: ignore[arg-type]  # wrong on purpose


def test_with_fewer_than_five_inputs_nothing_is_distilled(coarse: QuantizedModel, trained: networks.Residual) -> None:
    few = networks.images(4, seed=0)

    result, found = Student(trained, [{"image": few}], [[trained(few).detach()]]).distilled(coarse)

    assert (found.steps, found.kept) == (0, 0)
    assert same(result, coarse)


def test_inputs_of_several_sizes_are_distilled(trained: networks.Residual) -> None:
    parts: list[Tensor] = [networks.images(20, seed=side, side=side) for side in (8, 10, 12)]
    model = calque.quantize(trained, parts, bits="w2a4", recipe="nearest")
    with torch.no_grad():
        targets = [[trained(part)] for part in parts]

    _, found = Student(trained, [{"image": part} for part in parts], targets).distilled(model)

    assert found.after < found.before


def test_mixed_inputs_lie_between_two_and_have_the_teachers_answer() -> None:
    rows = Rows([torch.arange(8.0)[:, None]], [torch.zeros(8, 1)], 8)

    found = mixed(rows, 1.0, lambda inputs: [2 * inputs[0]], generator())

    x, neighbour = rows.inputs[0], rows.inputs[0].roll(1, 0)
    assert torch.equal(found.references[0], 2 * found.inputs[0])
    assert (found.inputs[0] >= torch.minimum(x, neighbour)).all()
    assert (found.inputs[0] <= torch.maximum(x, neighbour)).all()
    assert not torch.equal(found.inputs[0], x)


def test_a_share_of_mixtures_leaves_the_other_rows() -> None:
    rows = Rows([torch.rand(400, 3, generator=generator(1))], [torch.zeros(400)], 400)

    found = mixed(rows, 0.25, lambda inputs: [inputs[0]], generator())

    changed = (found.inputs[0] != rows.inputs[0]).any(1).float().mean()
    assert 0.18 < changed < 0.32  # the standard deviation is 0.02


@pytest.mark.parametrize(
    "inputs",
    [
        [torch.zeros(4, 2, dtype=torch.int64)],
        [torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)],
        [torch.zeros(4, 2), torch.ones(3)],
        [torch.zeros(4, 2), 3],
    ],
    ids=["tokens", "mask", "shared", "constant"],
)
def test_inputs_that_are_no_float_rows_are_not_mixed(inputs: list[object]) -> None:
    rows = Rows(inputs, [torch.zeros(4)], 4)

    assert not can_mix(rows)
    assert mixed(rows, 1.0, lambda _: [], generator()) is rows


QUICK = replace(NEAREST, distillation=HOW)
SETTINGS = {
    "minutes": replace(QUICK, distillation=replace(HOW, minutes=0.001, steps=0)),
    "steps": replace(QUICK, distillation=replace(HOW, steps=41)),
    "rows": replace(QUICK, distillation=replace(HOW, rows=15)),
    "mixup": replace(QUICK, distillation=replace(HOW, mixup=0.0)),
    "loss": replace(QUICK, distillation=replace(HOW, loss="mse")),
    "rates": replace(QUICK, distillation=replace(HOW, rates=replace(RATES, bias=0.05))),
}


@pytest.fixture(scope="module")
def base(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    return calque.quantize(trained, calibration, bits="w2a4", recipe=QUICK)


@pytest.mark.parametrize("field", SETTINGS)
def test_each_setting_changes_the_network(
    field: str, base: QuantizedModel, trained: networks.Residual, calibration: Tensor
) -> None:
    assert not same(base, calque.quantize(trained, calibration, bits="w2a4", recipe=SETTINGS[field]))


def test_the_runs_own_loss_can_be_distilled_by(trained: networks.Residual, calibration: Tensor) -> None:
    by_run = replace(QUICK, distillation=replace(HOW, loss="run"))
    by_name = replace(QUICK, distillation=replace(HOW, loss="mse"))

    one, other = (calque.quantize(trained, calibration, bits="w2a4", recipe=recipe) for recipe in (by_run, by_name))

    assert same(one, other)


def test_the_report_has_what_distillation_gained(base: QuantizedModel) -> None:
    found = base.report.distilled

    assert found.steps == 40
    assert found.after < found.before
    assert "distillation" in base.report.phases
    assert "40 steps in" in str(base.report)
    assert Report.from_json(base.report.to_json()) == base.report


def test_accurate_starts_from_fast_and_only_adds_distillation() -> None:
    assert replace(ACCURATE, name="fast", distillation=FAST.distillation) == FAST
    assert ACCURATE.distillation


def test_a_finished_distillation_is_not_repeated(
    trained: networks.Residual, calibration: Tensor, tmp_path: Path
) -> None:
    steps: list[str] = []

    def run() -> QuantizedModel:
        return calque.quantize(
            trained, calibration, bits="w2a4", recipe=QUICK, run=tmp_path,
            progress=lambda phase, done, total: steps.append(phase),
        )  # fmt: skip

    first = run()
    told = steps.count("distillation")
    again = run()

    assert told == 40
    assert steps.count("distillation") == 40
    assert same(first, again)
    assert again.report.distilled == first.report.distilled


def test_biases_are_tuned_behind_a_distillation(trained: networks.Residual, calibration: Tensor) -> None:
    both: Recipe = replace(QUICK, tuning=Tuning("adam", 8, 16, 1e-3, "biases"))

    q = calque.quantize(trained, calibration, bits="w2a4", recipe=both)

    assert list(q.report.phases)[-3:] == ["distillation", "biases", "fidelity"]
    assert q.report.tuned[1] <= q.report.tuned[0]


def test_under_a_budget_only_the_winner_is_distilled(trained: networks.Residual, calibration: Tensor) -> None:
    steps: list[str] = []

    q = calque.quantize(
        trained, calibration, bits=("w4a4", "w2a4"), budget=calque.Budget(size=0.85), recipe=QUICK,
        progress=lambda phase, done, total: steps.append(phase),
    )  # fmt: skip

    assert steps.count("distillation") == 40
    assert q.report.distilled.after <= q.report.distilled.before


def test_tokens_are_distilled_without_being_mixed() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.head((self.embed(words) * mask[..., None]).sum(1))
            return y

    net = networks.seeded(Words())
    words = torch.randint(11, (60, 5), generator=generator())
    mask = torch.rand(60, 5, generator=generator(1)) < 0.7

    gentle = replace(QUICK, distillation=replace(HOW, rates=replace(RATES, weight=0.01)))
    q = calque.quantize(
        net, {"words": words, "mask": mask}, bits="w2a4", first_last=None, recipe=gentle, override={"embed": None}
    )

    assert q.report.distilled.after < q.report.distilled.before
