"""Layers fitted on their float inputs, by any number of workers, in any order, and again after a kill."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
import torch.nn.functional as F
from joblib._parallel_backends import ThreadingBackend
from torch import Tensor, nn

import calque
import networks
from calque.calibration.job import Job
from calque.errors import CalibrationError
from calque.fitting.parallel import Choices, Fits, fit_choices
from calque.grid.bits import FLOAT, Bits
from calque.network import Network, capture
from calque.recipe import SEQUENTIAL, AdaQuant, Nearest, Parallel, RelativeRates, Search, Sequential
from calque.run.checkpoint import Checkpoint
from calque.settings import Method
from networks import Net

INPUTS = networks.images(40, seed=0)
STEPS = 16
CHOICES = {
    "stem": (Bits(8, 8), Bits(3, 4)),
    "conv1": (Bits(4, 4), FLOAT, Bits(2, None)),
    "conv2": (Bits(4, 4), Bits(4, 6)),
    "down": (Bits(3, 4),),
    "head": (FLOAT,),
}
WANTED = {(name, bits) for name, options in CHOICES.items() for bits in options if bits != FLOAT}
# Step sizes of its own, so that tuning the recipes moves no result here.
RATES = RelativeRates(weight=0.01, weight_scale=3e-3, bias=1e-3, activation_scale=3e-3, zero_point=0.01)
FEW = AdaQuant(STEPS, RATES)
QUICK = replace(SEQUENTIAL, fit=FEW, flavour=Parallel(), normalization=None)


@pytest.fixture(scope="module")
def network() -> Network:
    return capture(networks.seeded(networks.Residual()), {"image": INPUTS[:4]}, {})


def job_of(network: Network, folder: Path | None = None, **options: Any) -> Job:
    batches = [{"image": part} for part in networks.pieces(INPUTS, [16, 16, 8])]
    return Job(network, batches, checkpoint=Checkpoint(folder), **options)  # type: ignore[arg-type]  # batches


def fitted(job: Job, choices: Choices, method: Method) -> Fits:
    return fit_choices(job, choices, method, SEQUENTIAL.ranges)


def same(one: Fits, other: Fits) -> bool:
    """Whether the fits are equal to the last bit."""

    def numbers(fits: Fits, key: tuple[str, Bits]) -> list[Tensor]:
        fit = fits[key]
        grid = [] if fit.grid is None else [fit.grid.scale, fit.grid.zero_point, torch.tensor(fit.grid.qmax)]
        return [fit.codes, fit.scale, fit.bias, torch.tensor([fit.before, fit.after], dtype=torch.float64), *grid]

    if one.keys() != other.keys():
        return False
    pairs = ((numbers(one, key), numbers(other, key)) for key in one)
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairs)


@pytest.fixture(scope="module")
def fits(network: Network) -> Fits:
    return fitted(job_of(network), CHOICES, FEW)


def test_every_choice_but_float_has_a_fit_on_its_grid(network: Network, fits: Fits) -> None:
    assert set(fits) == WANTED
    for (name, bits), fit in fits.items():
        assert bits.weight is not None
        limit = 2 ** (bits.weight - 1)
        assert -limit <= fit.codes.min() < fit.codes.max() <= limit - 1
        assert fit.codes.numel() == network.weighted(name).weight.numel()
        highest = None if fit.grid is None else fit.grid.qmax
        assert highest == (None if bits.activation is None else 2**bits.activation - 1)


def test_a_fit_is_never_worse_than_rounding_and_steps_improve_it(network: Network) -> None:
    rounded, fits = (fitted(job_of(network), CHOICES, method) for method in (Nearest(), AdaQuant(4 * STEPS, RATES)))

    assert all(fit.after <= fit.before for fit in (*fits.values(), *rounded.values()))
    assert sum(fits[key].after < 0.99 * rounded[key].after for key in WANTED) >= 3
    assert all(fits[key].before == rounded[key].before for key in WANTED)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_fits_do_not_depend_on_the_number_of_workers(network: Network, fits: Fits, workers: int) -> None:
    assert torch.get_num_threads() == 1  # where this process has more, only its own sums may differ

    with joblib.parallel_config(backend="threading" if workers == 4 else "loky"):
        assert same(fitted(job_of(network, workers=workers), CHOICES, FEW), fits)
    assert torch.get_num_threads() == 1


def test_the_fits_do_not_depend_on_the_order_or_the_presence_of_other_choices(network: Network, fits: Fits) -> None:
    backwards = {name: tuple(reversed(options)) for name, options in reversed(CHOICES.items())}
    alone = {**dict.fromkeys(CHOICES, ()), "conv2": (Bits(4, 6),)}

    assert same(fitted(job_of(network), backwards, FEW), fits)
    assert same(
        fitted(job_of(network), alone, FEW), {("conv2", Bits(4, 6)): fits["conv2", Bits(4, 6)]}
    )  # fmt: skip


@pytest.mark.parametrize("workers", [None, 2])
def test_the_fits_do_not_depend_on_how_many_problems_wait_for_workers(
    network: Network, fits: Fits, workers: int | None
) -> None:
    with joblib.parallel_config(backend="threading"):
        assert same(fitted(job_of(network, workers=workers, memory=1000), CHOICES, FEW), fits)


def test_another_seed_gives_other_fits(network: Network, fits: Fits) -> None:
    assert not same(fitted(job_of(network, seed=1), CHOICES, FEW), fits)


def test_problems_are_deleted_and_results_stay_in_the_runs_folder(network: Network, tmp_path: Path) -> None:
    fitted(job_of(network, tmp_path), CHOICES, Nearest())

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(WANTED)
    assert not any("problems" in path.parts for path in files)


def test_without_a_run_nothing_stays_on_disk(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    fitted(job_of(network), CHOICES, Nearest())

    assert not list(tmp_path.iterdir())


def test_half_of_the_results_are_made_again_as_they_were(network: Network, fits: Fits, tmp_path: Path) -> None:
    fitted(job_of(network, tmp_path), CHOICES, FEW)
    results = sorted(path for path in tmp_path.rglob("*.safetensors"))
    for path in results[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in results[1::2]}

    again = fitted(job_of(network, tmp_path), CHOICES, FEW)

    assert same(again, fits)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_damaged_result_is_made_again(network: Network, fits: Fits, tmp_path: Path) -> None:
    fitted(job_of(network, tmp_path), CHOICES, FEW)
    spoiled = sorted(tmp_path.rglob("*.safetensors"))[0]
    spoiled.write_bytes(spoiled.read_bytes()[:50])

    assert same(fitted(job_of(network, tmp_path), CHOICES, FEW), fits)


def test_finished_fits_are_not_made_again(network: Network, tmp_path: Path) -> None:
    calls: list[str] = []
    fitted(job_of(network, tmp_path), CHOICES, Nearest())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}

    fitted(job_of(network, tmp_path, progress=lambda *call: calls.append(call[0])), CHOICES, Nearest())

    assert not calls
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files


def test_fits_by_another_method_in_the_same_run_are_others(network: Network, fits: Fits, tmp_path: Path) -> None:
    fitted(job_of(network, tmp_path), CHOICES, Nearest())  # as prices may have been measured

    assert same(fitted(job_of(network, tmp_path), CHOICES, FEW), fits)


class Counting(ThreadingBackend):  # type: ignore[misc]  # joblib ships no types
    """A backend of the caller's own."""

    batches = 0

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        type(self).batches += 1
        return super().submit(*args, **kwargs)


def test_a_backend_that_the_caller_registered_is_used_and_gives_the_same(network: Network, fits: Fits) -> None:
    joblib.register_parallel_backend("counting", Counting)
    Counting.batches = 0

    with joblib.parallel_config(backend="counting"):
        received = fitted(job_of(network, workers=2), CHOICES, FEW)

    assert Counting.batches > 0
    assert same(received, fits)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_task_that_fails_raises_its_own_error(network: Network, tmp_path: Path, workers: int | None) -> None:
    fitted(job_of(network, tmp_path), CHOICES, Nearest())
    path = next(tmp_path.rglob("conv1_w4a4*"))
    path.unlink()
    path.mkdir()  # a result cannot be written there

    with joblib.parallel_config(backend="threading"), pytest.raises(OSError, match="conv1_w4a4"):
        fitted(job_of(network, tmp_path, workers=workers), CHOICES, Nearest())


def test_an_operator_that_fails_is_named() -> None:
    network = capture(
        networks.seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), {"input": networks.images(4, 0)}, {}
    )
    batches = [{"input": networks.images(4, 0)}, {"input": networks.images(4, 0, side=9)}]
    job = Job(network, batches)  # type: ignore[arg-type]  # batches of tensors

    with pytest.raises(CalibrationError, match="fails on calibration batch 1"):
        fitted(job, dict.fromkeys(network.layers, (Bits(4, 4),)), Nearest())


@pytest.mark.parametrize("workers", [None, 2])
def test_whole_inputs_go_through_the_problems_files(network: Network, fits: Fits, workers: int | None) -> None:
    whole = replace(FEW, patches="all")

    with joblib.parallel_config(backend="threading"):
        received = fitted(job_of(network, workers=workers), CHOICES, whole)

    assert all(fit.before == fits[key].before for key, fit in received.items())
    assert sum(fit.after < 0.99 * fit.before for fit in received.values()) >= 3
    assert any(not torch.equal(fit.codes, fits[key].codes) for key, fit in received.items())


def test_whole_inputs_of_several_sizes_and_an_activation_with_arguments_are_fitted() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y: Tensor = net.b(F.hardtanh(net.a(x), -0.5, 0.75))
        return y

    net = Net(forward, a=nn.Conv2d(1, 4, 3, padding=1), b=nn.Conv2d(4, 2, 3, stride=2, groups=2))
    free = {"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    network = capture(net, {"x": networks.images(4, 0)}, free)
    batches = [{"x": networks.images(60, 0)}, {"x": networks.images(40, 1, side=10)}]
    job = Job(network, batches, workers=2)  # type: ignore[arg-type]  # of tensors

    with joblib.parallel_config(backend="threading"):
        fits = fitted(job, dict.fromkeys(network.layers, (Bits(3, 4),)), replace(FEW, patches="all"))

    assert all(fit.after <= fit.before for fit in fits.values())
    assert any(fit.after < fit.before for fit in fits.values())


# ---- the parallel flavour, end to end


def test_the_parallel_flavour_has_the_codes_of_the_parallel_fits(network: Network) -> None:
    plan = {"stem": "w8a8", "conv1": "w4a4", "conv2": "w3a4", "down": "w2a8", "head": "w4"}
    model = networks.seeded(networks.Residual())

    with joblib.parallel_config(backend="threading"):
        q = calque.quantize(
            model, INPUTS, plan=calque.Plan({n: Bits.parse(b) for n, b in plan.items()}), recipe=QUICK, workers=2
        )
    alone = calque.quantize(
        model, INPUTS, plan=calque.Plan({n: Bits.parse(b) for n, b in plan.items()}), recipe=QUICK
    )  # fmt: skip

    chosen = {name: (Bits.parse(bits),) for name, bits in plan.items()}
    whole = replace(job_of(network), batches=[{"image": INPUTS}])
    expected = fitted(whole, chosen, FEW)
    for (name, _), fit in expected.items():
        assert torch.equal(q.layers[name].codes.flatten(), fit.codes.flatten()), name
        assert torch.equal(q.layers[name].codes, alone.layers[name].codes)
    sequential = calque.quantize(model, INPUTS, plan=q.plan, recipe=replace(QUICK, flavour=Sequential()))
    assert any(not torch.equal(q.layers[n].codes, sequential.layers[n].codes) for n in plan)


def test_the_flavours_differ_but_for_the_first_layer() -> None:
    model = networks.seeded(networks.Residual())

    parallel, sequential = (
        calque.quantize(model, INPUTS, bits="w3a3", recipe=replace(QUICK, flavour=flavour))
        for flavour in (Parallel(), Sequential())
    )

    assert not torch.equal(parallel.layers["down"].codes, sequential.layers["down"].codes)


class Twice(nn.Module):
    """One convolution, called on inputs of very different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(2 * 64, 3)

    def forward(self, image: Tensor) -> Tensor:
        image = torch.cat([image, 0.05 * image.flip(3)], 1)
        x = F.relu(self.twice(image))
        y: Tensor = self.head(F.relu(self.twice(torch.cat([0.02 * x[:, :1], x[:, 1:]], 1))).flatten(1))
        return y


def test_tied_layers_of_the_parallel_flavour_share_codes_and_the_scales_that_belong_to_them() -> None:
    q = calque.quantize(
        networks.seeded(Twice()), INPUTS, bits="w2a8", first_last=None, recipe=replace(QUICK, fit=Nearest())
    )

    assert torch.equal(q.layers["twice"].codes, q.layers["twice#2"].codes)
    assert torch.equal(q.layers["twice"].scale, q.layers["twice#2"].scale)


def test_a_run_of_the_parallel_flavour_under_a_budget_is_the_same_in_a_folder_and_without(tmp_path: Path) -> None:
    model, recipe = networks.seeded(networks.Residual()), replace(QUICK, search=Search(finalists=1))
    budget = calque.Budget(size=0.92)

    def run(folder: Path | None) -> dict[str, Tensor]:
        q = calque.quantize(model, INPUTS, bits=("w8a8", "w3a4"), budget=budget, recipe=recipe, run=folder)
        return {name: layer.codes for name, layer in q.layers.items()}

    kept, again, free = run(tmp_path), run(tmp_path), run(None)

    assert all(torch.equal(kept[name], free[name]) for name in free)
    assert all(torch.equal(kept[name], again[name]) for name in free)


def quantize_by_workers() -> None:
    budget = calque.Budget(bops=0.2)
    calque.quantize(networks.small(), INPUTS, bits=("w8a8", "w4a4"), budget=budget, recipe="fast", workers=2)


@pytest.mark.slow  # another process imports everything
def test_a_process_that_ends_does_not_wait_for_idle_workers() -> None:
    process = multiprocessing.get_context("spawn").Process(target=quantize_by_workers)
    process.start()
    process.join(150)  # idle workers of joblib's own default would take 300 seconds
    alive = process.is_alive()
    process.kill()

    assert not alive
    assert process.exitcode == 0
