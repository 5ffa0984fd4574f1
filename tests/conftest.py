"""Fixtures that several files share; each is made once."""

import pytest
import pytest_randomly
import torch
from hypothesis import settings
from torch import Tensor

import networks

# qonnx registers a hook that prints at every test; what a test captures would begin with it.
pytest_randomly.entrypoint_reseeds = []

# An example's time says how busy or old the machine is, not whether the code is right.
settings.register_profile("calque", deadline=None)
settings.load_profile("calque")

# The networks are tiny: more threads only wait for each other, 20 times as long on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained() -> networks.Residual:
    return networks.trained()


@pytest.fixture(scope="session")
def calibration() -> Tensor:
    return networks.stripes(128, seed=3)[0]


@pytest.fixture(scope="session")
def test_inputs() -> Tensor:
    return networks.stripes(256, seed=4)[0]
