"""What the report says the network lost, against NumPy on the same rows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.calibration.fidelity import fidelity, held_out_fidelity
from calque.gains import LIMIT_DB, Fidelity, OutputFidelity
from calque.network.outputs import flatten_outputs
from calque.network.paths import leaf_paths, output_names
from calque.recipe import LIGHT, SEQUENTIAL, AdaQuant
from calque.report import Report
from networks import Branching, Net


class Point(NamedTuple):
    left: Tensor
    right: Tensor


ALONE = flatten_outputs(torch.zeros(1))[1]


def decibels(exact: Tensor, found: Tensor) -> float:
    x, y = exact.double().numpy(), found.double().numpy()
    return float(10 * np.log10(x.var() / ((x - y) ** 2).mean()))


def divergence(exact: Tensor, found: Tensor) -> float:
    p, q = (np.exp(each.double().numpy()) for each in (exact, found))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum(1).mean())


def two_heads(net: Net, x: Tensor) -> dict[str, Tensor]:
    y = torch.relu(net.stem(x)).mean((2, 3))
    return {"scores": net.scores(y), "box": net.box(y)[:, :1]}


def heads() -> Net:
    return Net(two_heads, stem=nn.Conv2d(1, 6, 3), scores=nn.Linear(6, 4), box=nn.Linear(6, 3))


def outputs(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("count", [128, 61])
def test_it_is_that_of_the_last_fifth_of_the_calibration_inputs(trained: networks.Residual, count: int) -> None:
    inputs = networks.stripes(count, seed=3)[0]

    q = calque.quantize(trained, inputs, bits="w2a4", recipe=LIGHT)

    found = q.report.fidelity
    last = inputs[count - count // 5 :]
    exact, quantized = outputs(trained, last), outputs(q, last)
    assert (found.inputs, found.held_out) == (count // 5, True)
    (output,) = found.outputs
    assert output.name == "output"
    assert output.decibels == pytest.approx(decibels(exact, quantized), abs=1e-3)
    assert output.kl == pytest.approx(divergence(exact, quantized), rel=1e-3, abs=1e-7)
    assert output.same_class == (exact.argmax(1) == quantized.argmax(1)).double().mean().item()


@pytest.mark.parametrize(
    ("recipe", "held_out"),
    [("nearest", True), (replace(SEQUENTIAL, fit=AdaQuant(steps=2)), True), ("fast", False)],
)
def test_closed_forms_use_every_input_and_the_report_says_so(
    trained: networks.Residual, calibration: Tensor, recipe: Any, held_out: bool
) -> None:
    q = calque.quantize(trained, calibration, bits="w4a4", recipe=recipe)

    assert q.report.fidelity.held_out is held_out
    words = "25 held-out calibration inputs" if held_out else "25 calibration inputs that the fits used as well"
    assert f"outputs on {words}: " in str(q.report)


def test_fewer_than_five_inputs_are_all_compared_and_none_is_called_held_out(trained: networks.Residual) -> None:
    q = calque.quantize(trained, networks.stripes(4, seed=3)[0], bits="w8a8", recipe="light")

    assert (q.report.fidelity.inputs, q.report.fidelity.held_out) == (4, False)


def test_the_worst_output_is_named_and_scores_keep_their_kl() -> None:
    model, x = networks.seeded(heads()), networks.images(100, seed=1)

    q = calque.quantize(model, x, bits="w3a4", recipe="nearest", first_last=None)

    found = q.report.fidelity
    exact, quantized = outputs(model, x[80:]), outputs(q, x[80:])
    assert [output.name for output in found.outputs] == ["scores", "box"]
    for output in found.outputs:
        assert output.decibels == pytest.approx(decibels(exact[output.name], quantized[output.name]), abs=1e-3)
    scores, box = found.outputs
    assert scores.kl == pytest.approx(divergence(exact["scores"], quantized["scores"]), rel=1e-3)
    assert box.kl is None
    assert found.worst == min(found.outputs, key=lambda output: output.decibels)
    assert f"worst of 2 is {found.worst.name}: {found.worst.decibels:.1f} dB" in str(q.report)
    assert f"KL {scores.kl:.3g} nats" in str(q.report)


@pytest.mark.filterwarnings("ignore::calque.errors.CaptureWarning")
def test_a_budget_and_parts_have_it_too(trained: networks.Residual, calibration: Tensor) -> None:
    budgeted = calque.quantize(
        trained, calibration, bits=("w8a8", "w2a4"), budget=calque.Budget(size=0.85), recipe=LIGHT
    )
    model, x = networks.seeded(Branching()), networks.images(60, seed=1)
    partly = calque.quantize(model, x, bits="w4a8", recipe="nearest", placement="inputs")

    exact, quantized = outputs(trained, calibration[-25:]), outputs(budgeted, calibration[-25:])
    assert budgeted.report.fidelity.worst.decibels == pytest.approx(decibels(exact, quantized), abs=1e-3)
    assert isinstance(partly, calque.PartlyQuantized)
    found = partly.report.fidelity
    assert (found.inputs, found.held_out) == (12, True)
    assert found.worst.decibels == pytest.approx(decibels(outputs(model, x[48:]), outputs(partly, x[48:])), abs=0.05)


def test_it_comes_back_from_json_and_older_reports_have_none(trained: networks.Residual, calibration: Tensor) -> None:
    report: Report = calque.quantize(trained, calibration, recipe="nearest").report
    older = {name: value for name, value in json.loads(report.to_json()).items() if name != "fidelity"}

    assert Report.from_json(report.to_json()) == report
    again = Report.from_json(json.dumps(older))
    assert again.fidelity is None
    assert "outputs on" not in str(again)


def measured(pairs: list[tuple[Tensor, Tensor]]) -> OutputFidelity:
    found = fidelity([(len(one), [one], [other]) for one, other in pairs], ["y"], held_out=True)
    assert found is not None
    return found.outputs[0]


def test_batches_are_summed_up_far_from_zero_too() -> None:
    exact = 1e4 + torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))
    found = exact + 0.01 * torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(1))

    whole, split = (
        measured([(exact, found)]),
        measured(list(zip(networks.pieces(exact, 7), networks.pieces(found, 7), strict=True))),
    )

    assert whole.decibels == pytest.approx(decibels(exact, found), abs=1e-6)
    assert split.decibels == pytest.approx(whole.decibels, abs=1e-6)
    assert whole.kl is None


def test_equal_silent_and_broken_outputs_have_bounded_decibels() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    assert measured([(x, x)]).decibels == LIMIT_DB
    assert measured([(torch.ones(2, 1), torch.zeros(2, 1))]).decibels == -LIMIT_DB
    assert measured([(x, torch.full_like(x, torch.nan))]).decibels == -LIMIT_DB
    assert "equal" in str(Fidelity(2, True, (measured([(x, x)]),)))


def test_what_a_mask_leaves_infinite_is_left_out() -> None:
    exact = torch.tensor([[[1.0, -torch.inf], [3.0, 5.0]]])
    found = torch.tensor([[[1.0, -torch.inf], [3.0, 4.0]]])

    assert measured([(exact, found)]).decibels == pytest.approx(
        decibels(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 3.0, 4.0])), abs=1e-6
    )


def test_outputs_without_real_numbers_or_whose_number_values_decide_on_have_none() -> None:
    x = torch.ones(4, 2)

    assert fidelity([(4, [x.long()], [x.long()])], ["y"], held_out=True) is None
    assert fidelity([(4, [x], [x[:3]])], ["y"], held_out=True) is None


def test_the_last_128_stand_for_many() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))

    q = calque.quantize(net, x, bits="w4a4", recipe="nearest", first_last=None)

    found = q.report.fidelity  # whole batches of 50
    assert found.inputs == 150
    assert found.worst.decibels == pytest.approx(decibels(outputs(net, x[850:]), outputs(q, x[850:])), abs=1e-3)


def test_outputs_of_a_cut_batch_are_computed_anew() -> None:
    batches: list[dict[str, object]] = [{"x": torch.arange(10.0)[:, None]}]

    def network(inputs: list[Any]) -> Sequence[Any]:
        return [inputs[0].T]  # the batch is its second axis

    found = held_out_fidelity(
        network, lambda inputs: [inputs[0].T + 1], batches, [network([batches[0]["x"]])], ALONE, fitted=False
    )

    assert found is not None
    assert found.inputs == 2
    assert found.worst.decibels == pytest.approx(10 * np.log10(0.25))  # 8 and 9, each off by 1


def test_leaves_are_named_as_forward_names_them() -> None:
    x = torch.ones(1)

    assert output_names(leaf_paths(flatten_outputs({"a": x, "b": (x, {"c": x})})[1])) == ["a", "b_0", "b_1_c"]
    assert output_names(leaf_paths(flatten_outputs(Point(x, x))[1])) == ["left", "right"]
    assert output_names(leaf_paths(flatten_outputs([x, 3, x])[1])) == ["output_0", "output_2"]
