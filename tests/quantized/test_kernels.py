"""What PyTorch runs against the exact integer evaluation, and both against the exported file: equal codes on every edge."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.errors import SpecError
from calque.grid.arithmetic import EXACT_FLOAT32
from calque.grid.bits import Placement
from calque.network import Geometry
from calque.network.rewrites.products import contracted_axes
from calque.quantized.kernels import add, average, fuse, multiply, scale_product, settle, settle_pool, whole_numbers
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.shipping.verify import run_onnx
from networks import Net

CALIBRATION, INPUTS = networks.images(24, seed=0), networks.images(16, seed=1)
DEPTH = 16  # blocks: a code that differs at one edge changes thousands behind it


def residual(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    for index in range(DEPTH):
        x = F.relu(net.get_submodule(f"b{index}")(F.relu(net.get_submodule(f"a{index}")(x))) + x)
    logits: Tensor = net.head(x.mean((2, 3)))
    return logits


@pytest.fixture(scope="module")
def deep() -> QuantizedModel:
    blocks = {f"{name}{index}": nn.Conv2d(4, 4, 3, padding=1) for index in range(DEPTH) for name in "ab"}
    net = Net(residual, stem=nn.Conv2d(1, 4, 3, padding=1), head=nn.Linear(4, 3), **blocks)
    for index in range(DEPTH):
        net.state_dict()[f"b{index}.weight"].mul_(0.4)
    return calque.quantize(net, CALIBRATION, bits="w4a4", recipe="nearest")


def inverted(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    for index in range(4):
        x = x + (F.hardtanh(net.mix(x)) if index else net.project(F.relu6(net.depthwise(F.relu6(net.expand(x))))))
    logits: Tensor = net.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
    return logits


def mobile() -> Net:
    return Net(
        inverted, stem=nn.Conv2d(1, 4, 3, padding=1), expand=nn.Conv2d(4, 12, 1), project=nn.Conv2d(12, 4, 1),
        depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12), mix=nn.Conv2d(4, 4, 1), head=nn.Linear(4, 3),
    )  # fmt: skip


def fire(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.squeeze(x))
    x = F.max_pool2d(torch.cat([F.relu(net.narrow(x)), F.relu(net.wide(x))], 1), 2)
    logits: Tensor = net.head(F.avg_pool2d(x * net.gate(x), 3, 1, 1, count_include_pad=False).flatten(1))
    return logits


def branches() -> Net:
    return Net(
        fire, squeeze=nn.Conv2d(1, 4, 1), narrow=nn.Conv2d(4, 4, 1), wide=nn.Conv2d(4, 4, 3, padding=1),
        gate=nn.Conv2d(8, 8, 1), head=nn.Linear(128, 3),
    )  # fmt: skip


def attend(net: Net, x: Tensor) -> Tensor:
    tokens = net.embed(x.flatten(1, 2))
    query, key, value = net.query(tokens), net.key(tokens), net.value(tokens)
    weights = torch.einsum("nid,njd->nij", query, key).softmax(-1)
    logits: Tensor = net.head((weights @ value + tokens).mean(1))
    return logits


def attention() -> Net:
    parts = {name: nn.Linear(12, 12) for name in ("query", "key", "value")}
    return Net(attend, embed=nn.Linear(8, 12), head=nn.Linear(12, 3), **parts)


def twice_read(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.a(x.flatten(1)))
    logits: Tensor = net.d(net.b(y) + net.c(y) + y)
    return logits


def several_readers() -> Net:
    return Net(twice_read, a=nn.Linear(64, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16), d=nn.Linear(16, 3))


def codes_of_module(q: QuantizedModel, x: Tensor) -> dict[str, Tensor]:
    """The codes of every edge while the module runs."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Quantizer, object, Tensor], None]:
        def hook(grid: Quantizer, _: object, values: Tensor) -> None:
            found[name] = (values / grid.scale + grid.zero_point).round().to(torch.uint8)

        return hook

    hooks = [grid.register_forward_hook(keep(name)) for name, grid in q.quantizers.items()]
    q(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("placement", ["integer", "inputs"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a2"])
@pytest.mark.parametrize("make", [mobile, branches, attention, several_readers])
def test_the_module_equals_the_exact_evaluation_at_every_edge(
    make: Callable[[], Net], bits: str, placement: Placement
) -> None:
    q = calque.quantize(
        make(), CALIBRATION, bits=bits, recipe="nearest", placement=placement, first_last=None,
        override={"c": "w4a4"} if make is several_readers else None,
    )  # fmt: skip
    exact, codes, _ = q.integer().trace(INPUTS)

    found = codes_of_module(q, INPUTS)

    assert found.keys() == codes.keys()
    assert {name for name in codes if not torch.equal(found[name], codes[name])} == set()
    assert torch.equal(q(INPUTS), exact[0])


@pytest.mark.slow
def test_a_deep_network_equals_the_exact_evaluation_and_its_file(tmp_path: Path, deep: QuantizedModel) -> None:
    exact, codes, _ = deep.integer().trace(INPUTS)

    found = codes_of_module(deep, INPUTS)

    assert {name for name in codes if not torch.equal(found[name], codes[name])} == set()
    assert torch.equal(deep(INPUTS), exact[0])
    file = calque.export_onnx(deep, tmp_path / "q.onnx")
    assert calque.verify(file, deep, networks.images(100, seed=2), bound=0).optimized.parted == ""
    assert torch.equal(run_onnx(file, [INPUTS]), deep(INPUTS))


def test_a_module_and_its_copies_and_its_pickle_give_the_same_bits(tmp_path: Path) -> None:
    q = calque.quantize(mobile(), CALIBRATION, recipe="nearest")
    before = q(INPUTS)
    torch.save(q, tmp_path / "q.pt")

    loaded = torch.load(tmp_path / "q.pt", weights_only=False)

    assert torch.equal(copy.deepcopy(q)(INPUTS), before)
    assert torch.equal(loaded(INPUTS), before)
    calque.save(loaded, tmp_path / "q.safetensors")
    assert torch.equal(calque.load(tmp_path / "q.safetensors", mobile())(INPUTS), before)
    calque.export_onnx(copy.deepcopy(q), tmp_path / "q.onnx")
    with pytest.raises(SpecError, match=r"needs the shapes of q's values, which pickle .* calque\.load\."):
        calque.export_onnx(loaded, tmp_path / "other.onnx")


def test_a_layer_that_feeds_no_grid_is_clipped_and_rounded_by_the_quantizer() -> None:
    q = calque.quantize(mobile(), CALIBRATION, recipe="nearest")
    before = q(INPUTS)

    for name, layer in q.layers.items():
        q.graph_module.set_submodule(name, layer.alone())

    assert (q(INPUTS) - before).abs().max() < 0.1 * before.std()


def test_every_add_product_and_pool_between_grids_is_a_kernel(deep: QuantizedModel) -> None:
    q = calque.quantize(branches(), CALIBRATION, recipe="nearest")

    targets = [node.target for model in (q, deep) for node in fuse(model.graph_module).nodes]

    assert targets.count(add) == DEPTH
    assert targets.count(average) == targets.count(settle_pool) == targets.count(multiply) == 1
    assert targets.count(settle) == 2 * DEPTH + 5


@pytest.mark.parametrize(
    ("pool", "features"),
    [
        (lambda x: F.avg_pool2d(x, 2), 16),
        (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), 16),
        (lambda x: F.pixel_unshuffle(x, 4).mean((2, 3)), 16),
        (lambda x: F.adaptive_avg_pool2d(F.pixel_unshuffle(x, 4), 1), 16),
    ],
    ids=["average", "without pads", "mean", "adaptive"],
)
def test_means_halfway_between_two_codes_are_rounded_as_in_the_file(
    tmp_path: Path, pool: Callable[[Tensor], Tensor], features: int
) -> None:
    """With one scale before and behind the pool, every fourth mean of four codes is a tie."""
    net = Net(lambda net, x: net.fc(pool(x).flatten(1)), fc=nn.Linear(features, 3))
    q = calque.quantize(net, CALIBRATION, bits="w8a8", recipe="nearest")
    before, behind = q.quantizers.values()
    before.scale.copy_(behind.scale)
    before.zero_point.fill_(101)

    result = calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, networks.images(60, seed=2), bound=0)

    assert result.optimized.parted == ""
    assert torch.equal(q(INPUTS), q.integer()(INPUTS))


def layer(codes: Tensor, bias: int, geometry: Geometry, *, zero_point: int) -> QuantizedLayer:
    channels = len(codes)
    made = QuantizedLayer(
        geometry, codes, torch.ones(channels), torch.full((channels,), bias, dtype=torch.int32), torch.ones(channels), bits=8
    )  # fmt: skip
    made.read(Quantizer(torch.tensor(1.0), torch.tensor(zero_point), bits=8))
    return made


@pytest.mark.parametrize(
    ("geometry", "shape", "bias"),
    [
        (Geometry("linear"), (4, 900), 7),
        (Geometry("linear"), (4, 301), 2**29 + 1),
        (Geometry("convolution"), (4, 120, 3, 3), 7),
        (Geometry("convolution", groups=2), (4, 80, 3, 3), 7),
        (Geometry("convolution"), (4, 1, 27, 27), 7),
    ],
    ids=["linear", "large bias", "convolution", "groups", "one channel"],
)
@pytest.mark.parametrize("zero_point", [0, 255])
def test_sums_that_float32_would_round_are_exact(
    geometry: Geometry, shape: tuple[int, ...], bias: int, zero_point: int
) -> None:
    codes = torch.full(shape, 127, dtype=torch.int8)
    codes.view(-1)[::3] = 126
    made = layer(codes, bias, geometry, zero_point=zero_point)
    inputs = (3, shape[1]) if geometry.kind == "linear" else (3, geometry.groups * shape[1], *shape[2:])
    offsets = torch.randint(200, 256, inputs, generator=torch.Generator().manual_seed(0)).float()
    offsets = -offsets if zero_point else offsets

    sums = made.sums(offsets)

    exact = geometry.apply(offsets.double(), codes.double(), made.bias.double())
    assert exact.abs().max() > EXACT_FLOAT32
    assert torch.equal(sums, exact.float())


def test_a_layer_is_taken_apart_only_where_its_sums_could_leave_float32() -> None:
    """518 products of 255 x 127 stay below 2^24; 1036 are twice that, unless signs or the zero point halve their reach."""
    ones = torch.full((1, 1036), 127, dtype=torch.int8)
    signs = ones * torch.tensor([1, -1], dtype=torch.int8).repeat(518)
    linear = Geometry("linear")
    assert 518 * 255 * 127 < EXACT_FLOAT32 < 519 * 255 * 127

    pieces = [
        layer(codes, bias, linear, zero_point=zero)._count_parts()
        for codes, bias, zero in [
            (ones[:, :518], 0, 0),
            (ones[:, :518], 10**6, 0),
            (ones, 0, 0),
            (ones[:, :1030], 0, 128),
            (signs, 0, 0),
            (ones[:, :1], 2**25, 0),
        ]
    ]

    assert pieces == [1, 2, 2, 1, 1, 0]


def test_loaded_codes_are_counted_anew() -> None:
    small, large = (
        layer(torch.full((1, 1036), code, dtype=torch.int8), 0, Geometry("linear"), zero_point=0) for code in (1, 127)
    )
    x = torch.full((1, 1036), 255.0)
    x[0, :3] = 254.0
    small.sums(x)

    small.load_state_dict(large.state_dict())

    assert torch.equal(small.sums(x), large.sums(x))
    assert small._parts == 2


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("nid,njd->nij", ((0, 2),)),
        ("...id,...jd->...ij", ((0, -1),)),
        ("ab , bc -> a", ((0, 1), (1, 1))),
        ("ij,jk", ((0, 1),)),
        ("bhij,bhjd->bhid", ((0, 3),)),
    ],
)
def test_what_a_product_sums_over_is_found(equation: str, expected: tuple[tuple[int, int], ...]) -> None:
    graph = torch.fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")

    node = graph.call_function(torch.ops.aten.einsum.default, (equation, [left, right]))

    assert contracted_axes(node) == expected


@pytest.mark.parametrize("terms", [250, 600])
def test_products_are_exact_in_the_smaller_dtype_that_holds_their_sums(terms: int) -> None:
    """Offsets up to 255: 250 products stay below 2^24, 600 do not."""
    grids = (
        Quantizer(torch.tensor(0.5), torch.tensor(0), bits=8),
        Quantizer(torch.tensor(0.25), torch.tensor(0), bits=8),
    )
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(200, 256, shape, generator=generator) for shape in ((3, terms), (terms, 3)))

    factors = whole_numbers(0.5 * left, 0.25 * right, grids, ((0, -1),))
    product = scale_product(factors[0] @ factors[1], grids)

    assert factors[0].dtype == (torch.float32 if terms == 250 else torch.float64)
    assert torch.equal(product, ((left @ right).double() * 0.125).float())
