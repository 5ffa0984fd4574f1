"""Which bits layers may have under a budget, and which they have without one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from calque.errors import SpecError
from calque.grid.bits import FLOAT, Bits, Plan
from calque.network import Network, capture
from calque.network.heads import heads
from calque.quantized.decisions import decide_bits, decide_choices

CANDIDATES = ("w8a8", "w4a4", "w2a4")
LAYERS = ("stem", "conv1", "conv2", "down", "head")


@pytest.fixture(scope="module")
def network() -> Network:
    return capture(networks.seeded(networks.Residual()), {"image": networks.images(4, seed=0)}, {})


def choices_of(
    network: Network, override: dict[str, str | None] | None = None, first_last: str | None = "auto"
) -> tuple[dict[str, str], dict[str, str]]:
    """The choices of each layer, one text, and the bits of tensors."""
    choices, tensors = decide_choices(network, bits=CANDIDATES, override=override, first_last=first_last)
    return {n: " ".join(map(str, each)) for n, each in choices.items()}, {n: str(b) for n, b in tensors.items()}


ALL = " ".join(CANDIDATES)


@pytest.mark.parametrize("first_last", ["auto", None])
def test_under_a_budget_the_ends_are_choices_like_any_other(network: Network, first_last: str | None) -> None:
    assert choices_of(network, first_last=first_last) == (dict.fromkeys(LAYERS, ALL), {})


def test_first_last_fixes_the_ends_under_a_budget(network: Network) -> None:
    choices, _ = choices_of(network, first_last="w6a6")

    assert choices == {**dict.fromkeys(LAYERS, ALL), "stem": "w6a6", "head": "w6a6"}


def test_an_override_fixes_its_layers_under_a_budget_and_wins_over_first_last(network: Network) -> None:
    choices, tensors = choices_of(
        network, override={"conv?": "w5a5", "conv2": None, "head": "w3"}, first_last="w6a6"
    )  # fmt: skip

    assert choices == {"stem": "w6a6", "conv1": "w5a5", "conv2": "float", "down": ALL, "head": "w3"}
    assert tensors == {}


def test_an_override_of_tensors_leaves_every_layer_its_choices(network: Network) -> None:
    # the pattern matches layers as well, but bits of activations alone are for tensors
    choices, tensors = choices_of(network, override={"*": "a6", "conv2.output": None})

    assert choices == dict.fromkeys(LAYERS, ALL)
    assert tensors["conv2.output"] == "float"
    assert len(tensors) > 2
    assert {bits for name, bits in tensors.items() if name != "conv2.output"} == {"a6"}


def test_a_pattern_for_layers_and_one_for_tensors_are_both_obeyed(network: Network) -> None:
    choices, tensors = choices_of(network, override={"conv*": "a6", "conv1": "w8a8"})

    assert choices == {**dict.fromkeys(LAYERS, ALL), "conv1": "w8a8"}
    assert tensors == {"conv1.output": "a6", "conv2.output": "a6"}


def test_float_for_everything_is_for_layers_and_tensors(network: Network) -> None:
    choices, tensors = choices_of(network, override={"conv2*": None})

    assert choices == {**dict.fromkeys(LAYERS, ALL), "conv2": "float"}
    assert tensors == {"conv2.output": "float"}


def test_repeated_candidates_are_one_choice(network: Network) -> None:
    choices, _ = decide_choices(network, bits=("w4a4", "w8a8", "w4a4"), override=None, first_last=None)

    assert choices["down"] == (Bits(4, 4), Bits(8, 8))


def test_float_may_be_a_candidate(network: Network) -> None:
    choices, _ = decide_choices(network, bits=("float", "w8a8"), override=None, first_last=None)

    assert choices["down"] == (FLOAT, Bits(8, 8))


@pytest.mark.parametrize(
    ("bits", "override", "first_last", "message"),
    [
        ((), None, "auto", "at least one candidate of bits. Got none"),
        (("w8a8", "a4"), None, "auto", "bits must be"),
        (("w8a8", "int4"), None, "auto", "bits are written"),
        (("w9a8",), None, "auto", r"bits must be an int in \[2, 8\]"),
        (CANDIDATES, {"tail": "w4a4"}, "auto", "'tail' matches no layer or tensor"),
        (CANDIDATES, {"down.output": "w4a4"}, "auto", "tensor down.output: bits must be"),
        (CANDIDATES, None, "a8", "first_last must be"),
    ],
)
def test_choices_that_break_a_rule_are_refused(
    network: Network, bits: tuple[str, ...], override: dict[str, str | None] | None, first_last: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        decide_choices(network, bits=bits, override=override, first_last=first_last)


# ---- without a budget


def decided(network: Network, **options: object) -> dict[str, str]:
    given = {"bits": None, "plan": None, "override": None, "first_last": "auto", **options}
    return {name: str(bits) for name, bits in decide_bits(network, **given).items()}  # type: ignore[arg-type]  # by name


def test_float_everywhere_has_no_special_ends(network: Network) -> None:
    assert decided(network, bits="float") == dict.fromkeys(LAYERS, "float")


def test_a_plan_keeps_its_ends_unless_first_last_says_otherwise(network: Network) -> None:
    plan = Plan({**dict.fromkeys(LAYERS, Bits(3, 3)), "down.output": Bits(None, 5)})

    assert decided(network, plan=plan) == {**dict.fromkeys(LAYERS, "w3a3"), "down.output": "a5"}
    assert decided(network, plan=plan, first_last="w8a8")["stem"] == "w8a8"
    assert decided(network, plan=plan, first_last="w8a8")["conv1"] == "w3a3"


def test_a_network_of_one_layer_is_its_own_first_and_last() -> None:
    network = capture(networks.Net(lambda net, x: net.a(x), a=nn.Conv2d(1, 2, 3)), {"x": networks.images(2, 0)}, {})

    assert decided(network, bits="w4a4") == {"a": "w8a8"}
    assert decided(network, bits="w4a4", first_last=None) == {"a": "w4a4"}


def test_the_order_of_execution_decides_which_layer_is_first() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        y: Tensor = net.a(F.relu(net.m(F.relu(net.b(x)))))
        return y

    net = networks.Net(forward, a=nn.Conv2d(2, 2, 3), m=nn.Conv2d(2, 2, 3), b=nn.Conv2d(1, 2, 3))
    network = capture(net, {"x": networks.images(2, 0)}, {})

    assert decided(network, bits="w4a4") == {"b": "w8a8", "m": "w4a4", "a": "w8a8"}


def detector(net: networks.Net, x: Tensor) -> dict[str, object]:
    """Two scales of scores and boxes, and a stage of the backbone."""
    stage = torch.relu(net.stem(x))
    y = torch.relu(net.body(stage))
    boxes = torch.cat([net.box1(stage).flatten(2), net.box2(y).flatten(2)], 2).exp()
    return {
        "scores": (net.score(y) / 2.0 - 1).sigmoid(),
        "boxes": boxes,
        "stage": stage,
        "sum": net.left(y) + net.right(y),
    }


def several() -> networks.Net:
    names = {
        "stem": (1, 4),
        "body": (4, 4),
        "score": (4, 3),
        "box1": (4, 4),
        "box2": (4, 4),
        "left": (4, 2),
        "right": (4, 2),
    }
    return networks.Net(detector, **{name: nn.Conv2d(*sides, 3, padding=1) for name, sides in names.items()})


def test_every_head_of_several_outputs_is_a_last_layer() -> None:
    network = capture(several(), {"x": networks.images(4, seed=0)})

    entries = decide_bits(network, bits="w4a4", plan=None, override=None, first_last="auto")
    changed = decide_bits(network, bits="w4a4", plan=None, override={"box*": "w3a4"}, first_last="auto")

    kept = {name for name, bits in entries.items() if bits == Bits(8, 8)}
    assert heads(network) == ("box1", "box2", "score", "left", "right")
    assert kept == {"stem", "box1", "box2", "score", "left", "right"}
    assert changed["box1"] == Bits(3, 4)


def test_a_single_output_has_its_last_layer_alone() -> None:
    def forward(net: networks.Net, x: Tensor) -> Tensor:
        return torch.cat([net.left(x), net.right(x)], 1)

    two = networks.Net(forward, left=nn.Conv2d(1, 2, 3), right=nn.Conv2d(1, 2, 3))

    assert heads(capture(two, {"x": networks.images(4, seed=0)})) == ()
