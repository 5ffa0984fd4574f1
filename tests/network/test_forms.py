"""Layers in other forms: one-dimensional and transposed convolutions, products with constant matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
from calque.fitting.problem import layer_problem
from calque.network import Geometry, capture
from networks import Net
from slow import slow


def seeded(build: type[nn.Module] | nn.Module) -> nn.Module:
    model = build() if isinstance(build, type) else build
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CONVOLUTIONS: list[nn.Module] = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv1d(4, 6, 3, padding="same", groups=2),
    nn.Conv1d(4, 6, 2, dilation=3, bias=False),
]
TRANSPOSED = [
    nn.ConvTranspose2d(4, 6, 3, stride=stride, padding=padding, output_padding=extra, groups=groups)
    for stride in (1, 2, 3)
    for padding in (0, 1)
    for extra in (0, 1)
    for groups in (1, 2)
    if extra < stride
] + [
    nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), bias=False),
    nn.ConvTranspose2d(4, 6, 2, stride=2, padding=2),
]


TRANSPOSED_SIGNALS: list[nn.Module] = [
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2),
    nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=1, dilation=2, bias=False),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS + TRANSPOSED_SIGNALS, ids=str)
def test_one_dimensional_convolutions_are_layers(layer: nn.Module) -> None:
    network = capture(nn.Sequential(seeded(layer)), {"input": noise(5, 4, 11)})  # compares the outputs

    assert list(network.layers) == ["0"]
    assert network.left_float == ()


@pytest.mark.parametrize("layer", TRANSPOSED, ids=str)
def test_transposed_convolutions_are_layers(layer: nn.Module) -> None:
    network = capture(nn.Sequential(seeded(layer)), {"input": noise(5, 4, 6, 7)})

    assert list(network.layers) == ["0"]
    assert network.left_float == ()


class Signal(nn.Module):
    """Norms, activations, an add, pools, paddings, slices and a concatenation: on signals, or on images of height one."""

    def __init__(self, *, image: bool) -> None:
        super().__init__()
        conv, up, norm, pool, mean = (
            (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)
            if image
            else (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d)
        )

        def wide(length: int, height: int = 1) -> Any:
            return (height, length) if image else length

        self.image = image
        self.stem, self.norm1 = conv(2, 8, wide(5), padding=wide(2, 0), bias=False), norm(8)
        self.inner, self.norm2 = conv(8, 8, wide(3), dilation=wide(2)), norm(8)
        self.up, self.norm3 = up(8, 4, wide(4), stride=wide(2), padding=wide(1, 0)), norm(4)
        self.last, self.head = conv(12, 8, wide(3), groups=2), nn.Linear(8, 3)
        self.pool, self.mean = pool(wide(2)), mean(wide(3), wide(2), wide(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None] if self.image else x
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(x + self.norm2(self.inner(F.pad(x, (5, 0))))[..., 1:])
        y = F.relu6(self.norm3(self.up(self.pool(x))))
        x = F.leaky_relu(self.mean(self.last(torch.cat([x[..., :-1], y], 1)))) * 0.5
        logits: Tensor = self.head(x.mean((2, 3)) if self.image else x.flatten(2).mean(-1))
        return logits


@pytest.mark.parametrize("bits", [slow("w8a8"), "w4a4"])
def test_signals_have_the_codes_and_kernels_of_images_of_height_one(bits: str, tmp_path: Path) -> None:
    one, two = seeded_norms(Signal(image=False)), Signal(image=True)
    two.load_state_dict({name: x[:, :, None] if x.dim() == 3 else x for name, x in one.state_dict().items()})
    x = noise(48, 2, 23)
    signal, image = (calque.quantize(each.eval(), x, bits=bits, recipe="nearest") for each in (one, two))
    found, other = (calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, x, bound=0) for q in (signal, image))

    assert list(signal.layers) == ["stem", "inner", "up", "last", "head"]
    for name, layer in signal.layers.items():
        assert torch.equal(layer.codes, image.layers[name].codes)
    assert torch.equal(signal(x), image(x))
    assert signal.report.size == image.report.size
    assert found.integer_kernels == other.integer_kernels
    assert found.integer_kernels["QLinearConv"] == 4
    assert "BatchNormalization" not in found.float_kernels


def seeded_norms(model: nn.Module) -> nn.Module:
    """The network with statistics of batch norms that are none's defaults."""
    seeded(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean = noise(norm.num_features)
            norm.running_var = noise(norm.num_features).square() + 0.5
            norm.weight.data = noise(norm.num_features).abs() + 0.5
    return model


def test_operators_that_signals_and_images_do_not_share_stay_on_signals() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        y = y * net.gain + y.mean(1, keepdim=True)  # (6, 1) would lie along other axes of an image
        z: Tensor = net.again(y.softmax(-1)).transpose(1, 2)
        return z.cumsum(1)

    model = Net(forward, conv=nn.Conv1d(4, 6, 3), again=nn.Conv1d(6, 6, 3), gain=torch.zeros(6, 1))

    assert list(capture(model, {"x": noise(5, 4, 11)}).layers) == ["conv", "again"]


class Matrices(nn.Module):
    """GPT-2's Conv1D, and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.zeros(12))
        self.last = nn.Parameter(torch.zeros(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 12)
        return F.relu(y) @ self.last


def test_products_with_constants_are_linear_layers() -> None:
    network = capture(seeded(Matrices), {"x": noise(5, 3, 8)})

    assert [network.weighted(name).geometry.kind for name in network.layers] == ["linear", "linear"]
    assert [tuple(network.weighted(name).weight.shape) for name in network.layers] == [(12, 8), (5, 12)]
    assert network.products == {}


class Decoder(nn.Module):
    """Up and down again, with a head that tells stripes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.relu(self.up(F.relu(self.down(x)))))
        return y


def test_transposed_convolution_runs_on_integers(tmp_path: Path) -> None:
    x = noise(64, 1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder()
    q = calque.quantize(model, x, bits="w8a8", recipe="fast")
    found = calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, x)

    assert found.agreement == 1.0
    assert "float kernels: none" in str(found)
    with torch.no_grad():
        assert F.mse_loss(q(x), model(x)) < 1e-2 * model(x).var()


class Windows(nn.Module):
    """A linear layer on windows, which lie on the batch axis, as Swin cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.first(x).unflatten(1, (3, 2)).flatten(0, 1)
        y: Tensor = F.gelu(self.inner(windows)).reshape(x.shape)
        return y


@pytest.mark.parametrize("recipe", ["nearest", "fast", "sequential"])
def test_windows_on_the_batch_axis_are_rows_of_their_input(recipe: str) -> None:
    x = noise(60, 6, 4)
    model = seeded(Windows)
    q = calque.quantize(model, x, bits="w8a8", recipe=recipe, placement="inputs")

    with torch.no_grad():
        assert F.mse_loss(q(x), model(x)) < 1e-3 * model(x).var()
    counts = {layer.name: layer.macs for layer in q.report.layers}
    assert counts == {"first": 6 * 16, "inner": 6 * 16}


def test_held_out_rows_are_those_of_whole_inputs() -> None:
    weight = noise(4, 4)
    x = torch.arange(10.0).repeat_interleave(3)[:, None, None].expand(30, 2, 4)  # 10 inputs of 3 windows
    problem = layer_problem(
        Geometry("linear"), weight, weight[0], lambda y: y, [(x, x @ weight.mT)], inputs=10,
        generator=torch.Generator(), sizes=[10],
    )  # fmt: skip

    fitted, held_out = ({*problem.patches[0, rows, 0].tolist()} for rows in (problem.fitted, problem.held_out))
    assert not fitted & held_out
    assert fitted | held_out == {*range(10)}


class Scaled(nn.Embedding):
    """An embedding with a constant of its own below its name, as Gemma's."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__(20, 4)
        self.register_buffer("factor", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = super().forward(ids) * self.factor
        return y


def test_constants_below_a_layers_name_stay(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = Scaled(), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.words(ids))
            return y

    ids = torch.randint(20, (16, 3), generator=torch.Generator().manual_seed(0))
    q = calque.quantize(seeded(Net), ids, bits="w8a8", recipe="nearest")

    assert list(q.layers) == ["words", "head"]
    calque.save(q, tmp_path / "q.safetensors")
    assert torch.equal(calque.load(tmp_path / "q.safetensors", seeded(Net))(ids), q(ids))


def test_a_file_with_one_layer_called_again_loads_with_exact_products(tmp_path: Path) -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(F.gelu(self.layer(F.gelu(self.layer(x)))))
            return y

    x = noise(32, 3, 8)
    q = calque.quantize(seeded(Thrice), x, bits="w8a8", recipe="nearest", placement="inputs")
    path = calque.export_onnx(q, tmp_path / "q.onnx")

    assert list(q.layers) == ["layer", "layer#2", "layer#3"]
    assert calque.verify(path, q, x).agreement > 0.9


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.bag(ids))
        return y


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_one_length_are_embeddings(mode: str, tmp_path: Path) -> None:
    ids = torch.randint(20, (32, 4), generator=torch.Generator().manual_seed(0))
    q = calque.quantize(seeded(Bag(mode)), ids, bits="w8a8", recipe="nearest", placement="inputs")

    assert list(q.layers) == ["bag", "head"]
    assert calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, ids).agreement == 1.0


def test_bags_of_another_kind_stay_float_and_are_listed() -> None:
    ids = torch.randint(20, (32, 4), generator=torch.Generator().manual_seed(0))
    network = capture(seeded(Bag("max")), {"ids": ids})

    assert list(network.layers) == ["head"]
    assert "embedding_bag" in network.left_float[0]


def test_layers_of_multihead_attention_have_its_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x)
            return y

    network = capture(seeded(Net), {"x": noise(6, 5, 8)})

    assert list(network.layers) == [
        "block.self_attn.in_proj",
        "block.self_attn.out_proj",
        "block.linear1",
        "block.linear2",
    ]
    assert len(network.products) == 2
