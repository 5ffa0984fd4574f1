"""Codes, scales and biases are those that were recorded, bit for bit, where they were recorded."""

from collections.abc import Iterator

import pytest
import torch

from golden.cases import cases
from golden.record import environment, fingerprint, load

HERE = load().get(environment(), {})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason=f"no codes are recorded for {environment()}: python -m golden --record")
@pytest.mark.parametrize("name", cases())
def test_codes_are_the_recorded_ones(name: str) -> None:
    assert fingerprint(cases()[name]()) == HERE[name]
