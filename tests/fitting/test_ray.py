"""Fits on a Ray cluster of this machine: the same codes as in this process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

import calque
import networks
from calque.recipe import ADVANCED, AdaQuant, Parallel, Search

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install calque[ray]")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings are not ours to mend

RECIPE = replace(
    ADVANCED, name="quick", fit=AdaQuant(steps=10), flavour=Parallel(),
    search=Search(AdaQuant(steps=10), priced_inputs=64, finalists=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def pools() -> Iterator[list[int]]:
    """A cluster; the sizes of the pools of actors that joblib has asked it for."""
    from ray.util.joblib import register_ray
    from ray.util.joblib.ray_backend import RayBackend

    asked: list[int] = []

    class Counted(RayBackend):  # type: ignore[misc]  # Ray is without types where it is not installed
        def configure(self, n_jobs: int = 1, *arguments: Any, **options: Any) -> int:
            asked.append(n_jobs)
            return int(super().configure(n_jobs, *arguments, **options))

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_ray()
    joblib.register_parallel_backend("ray", Counted)
    yield asked
    ray.shutdown()


def quantized(run: Path | None, workers: int) -> dict[str, torch.Tensor]:
    q = calque.quantize(
        networks.seeded(networks.Residual()), networks.images(64, seed=0), bits=("w8a8", "w4a4", "w2a4"),
        budget=calque.Budget(size=0.83), recipe=RECIPE, run=run, workers=workers,
    )  # fmt: skip
    return q.state_dict()


@pytest.mark.parametrize("kept", [False, True])
def test_ray_gives_the_codes_that_this_machines_processes_give(pools: list[int], tmp_path: Path, kept: bool) -> None:
    pools.clear()
    expected = quantized(None, workers=1)

    with joblib.parallel_config(backend="ray"):
        found = quantized(tmp_path if kept else None, workers=2)

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert pools  # it was Ray that fitted
    assert set(pools) == {2}
