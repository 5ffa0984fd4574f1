"""The option `dynamic`: what does not fit is an error that names it, never a network in parts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import calque
import networks
from calque.errors import SpecError

X = networks.images(8, seed=0)
FREE: Any = Dim.AUTO


class Convolutions(nn.Module):
    """Takes images of any size, and a list of numbers that it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, image: Tensor, shifts: list[Tensor] | None = None, gain: float = 1.0) -> Tensor:
        y: Tensor = self.head(torch.relu(self.conv(image)).mean((2, 3))) * gain
        return y if shifts is None else y + shifts[0]


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ([2], r"dynamic is a dict of inputs and their axes.*Got \[2\]"),
        ("image", "dynamic is a dict of inputs and their axes.*Got 'image'"),
        ({"imgae": {2: FREE}}, "dynamic names inputs of forward: image, gain. Got 'imgae'"),
        ({2: {2: FREE}}, "dynamic names inputs of forward.*Got 2"),
        ({"shifts": {1: FREE}}, "dynamic names inputs of forward.*Got 'shifts'"),
        ({"gain": {1: FREE}}, r"dynamic names inputs that are tensors. gain is 1.5"),
        ({"image": 2}, r"dynamic\['image'\] maps axes to a Dim.*Got 2"),
        ({"image": None}, r"dynamic\['image'\] maps axes to a Dim.*Got None"),
        ({"image": (None, None, FREE, FREE)}, r"dynamic\['image'\] maps axes to a Dim.*Got a list of 4"),
        ({"image": {4: FREE}}, r"from 0 to 3 of image with the shape \(8, 1, 8, 8\). Got 4"),
        ({"image": {-1: FREE}}, "from 0 to 3 of image.*Got -1"),
        ({"image": {"height": FREE}}, "from 0 to 3 of image.*Got 'height'"),
        ({"image": {True: FREE}}, "from 0 to 3 of image.*Got True"),
        ({"image": {2.0: FREE}}, r"from 0 to 3 of image.*Got 2\.0"),
        ({"image": {0: FREE}}, "axis 0 of image is its batch.*Leave it out"),
        ({"image": {2: "auto"}}, r"dynamic\['image'\]\[2\] must be Dim.AUTO.*Got 'auto'"),
        ({"image": {2: 8}}, r"dynamic\['image'\]\[2\] must be Dim.AUTO.*Got 8"),
        ({"image": {2: None}}, r"dynamic\['image'\]\[2\] must be Dim.AUTO.*Got None"),
        ({"image": {2: Dim.STATIC}}, r"dynamic\['image'\]\[2\] must be Dim.AUTO.*leave out axes that are fixed"),
    ],
)
def test_what_is_no_axis_of_an_input_is_named(dynamic: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        calque.quantize(networks.seeded(Convolutions()), [{"image": X, "gain": 1.5}], recipe="nearest", dynamic=dynamic)


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        (Dim.AUTO, "it fixes axis 2 of input at 8"),
        (Dim.DYNAMIC, r"your code specialized it to be a constant \(8\)"),
        (Dim("height", min=4, max=64), r"your code specialized it to be a constant \(8\)"),
    ],
)
def test_an_axis_that_the_network_fixes_is_named(dim: Any, message: str) -> None:
    with pytest.raises(SpecError, match=f"dynamic does not fit the network.*{message}"):
        calque.quantize(networks.small(), X, recipe="nearest", dynamic={"input": {2: dim}})


@pytest.mark.parametrize(
    ("dim", "message"),
    [(Dim("height", min=2, max=6), r"8 not in range \[2, 6\]"), (Dim("height", min=20), "not in range")],
)
def test_a_range_without_the_inputs_is_named(dim: Any, message: str) -> None:
    with pytest.raises(SpecError, match=f"dynamic does not fit the network.*{message}"):
        calque.quantize(networks.seeded(Convolutions()), X, recipe="nearest", dynamic={"image": {2: dim}})


def test_free_axes_are_those_that_vary_and_those_that_are_given() -> None:
    wide = torch.cat([X, X], 3)

    q = calque.quantize(networks.seeded(Convolutions()), [X, wide], recipe="nearest", dynamic={"image": {2: FREE}})

    assert sorted(q.facts.dynamic["image"]) == [2, 3]
    with torch.no_grad():
        assert q(torch.cat([wide, wide], 2)).shape == (8, 2)
