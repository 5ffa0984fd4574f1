"""Small networks that the tests share, each for one property of a graph."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calque.quantized.model import QuantizedModel

Exported = Callable[..., tuple[QuantizedModel, Path]]  # the fixture of tests/conftest.py
CLASSES = 4
SIDE = 8


class Residual(nn.Module):
    """Convolutions with batch norms, a shortcut, a pool and a classifier: a real network in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(image)))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(y)) + x)
        x = F.relu(self.down(x))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network, in eval mode, with weights and statistics drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.5 * noise.abs())
        elif tensor.dim() > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return network.eval()


def pieces(tensor: Tensor, sizes: int | list[int]) -> list[Tensor]:
    """The tensor in pieces of these numbers of rows."""
    return list(tensor.split(sizes))  # type: ignore[no-untyped-call]


def images(count: int, seed: int, channels: int = 1, side: int = SIDE) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of four kinds of stripes under noise, with their kinds: a task learned in a second."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(CLASSES, (count,), generator=generator)
    steps = torch.arange(SIDE, dtype=torch.float32)
    angle = kinds.float() * torch.pi / CLASSES
    phase = torch.rand(count, generator=generator) * 2 * torch.pi
    along = angle.cos()[:, None, None] * steps[:, None] + angle.sin()[:, None, None] * steps
    waves = torch.sin(1.5 * along + phase[:, None, None])
    return (waves + 0.5 * torch.randn(waves.shape, generator=generator))[:, None], kinds


def trained() -> Residual:
    """A Residual network trained on `stripes`, the same on every call."""
    network = Residual()
    seeded(network)
    network.train()
    inputs, kinds = stripes(768, seed=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(120):
        picked = torch.randint(len(inputs), (64,), generator=generator)
        loss = F.cross_entropy(network(inputs[picked]), kinds[picked])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def small(seed: int = 0) -> nn.Module:
    """Two layers: quick where the network does not matter."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIDE - 2) ** 2, 3))
    return seeded(net, seed)


class Net(nn.Module):
    """A module of the given parts whose forward is a function of itself and an image."""

    def __init__(self, forward: Callable[["Net", Tensor], object], **parts: nn.Module | Tensor):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))
        seeded(self)

    def __getattr__(self, name: str) -> Any:  # a module or a parameter, as the test made it
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


class Branching(nn.Module):
    """Its own forward depends on data; its stages' do not, but for one of the two modules of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)), Deciding()])
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.mean() > -100:
            x = self.stages[0](x)
        y: Tensor = self.stages[1](x.flatten(1))
        return y


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, 4)
        self.odd = Odd()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return self.odd(y) if y.sum() < 1e9 else y


class Odd(nn.Module):
    """A weight of its own, behind control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain if x.sum() < 1e9 else x


@dataclass
class Plain:
    logits: Any
    hidden: Any = None
    version: int = 1
