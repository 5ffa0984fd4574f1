"""Shapes of well-known networks with random weights, for time and memory: ResNet-18, ResNet-50 and MobileNetV2."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class _Residual(nn.Module):
    """A branch beside a shortcut, then a ReLU (He et al., 1512.03385)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int):
        super().__init__()
        if outputs == width:
            parts = [_convolution(inputs, width, 3, stride), nn.ReLU(), _convolution(width, outputs, 3)]
        else:
            parts = [
                _convolution(inputs, width, 1), nn.ReLU(), _convolution(width, width, 3, stride), nn.ReLU(),
                _convolution(width, outputs, 1),
            ]  # fmt: skip
        self.branch = nn.Sequential(*parts)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def _resnet(blocks: tuple[int, ...], expansion: int) -> nn.Module:
    parts: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            parts.append(_Residual(inputs, width, width * expansion, stride))
            inputs = width * expansion
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class _Inverted(nn.Module):
    """An inverted bottleneck (Sandler et al., 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        expand = [_convolution(inputs, width, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = _convolution(width, width, 3, stride, groups=width)
        self.branch = nn.Sequential(*expand, depthwise, nn.ReLU6(), _convolution(width, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return x + y if self.residual else y


def _mobilenet_v2() -> nn.Module:
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    parts: list[nn.Module] = [_convolution(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for expansion, outputs, count, stride in stages:
        for index in range(count):
            parts.append(_Inverted(inputs, outputs, 1 if index else stride, expansion))
            inputs = outputs
    head = [_convolution(inputs, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*parts, *head)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: _resnet((2, 2, 2, 2), 1),
    "ResNet-50": lambda: _resnet((3, 4, 6, 3), 4),
    "MobileNetV2": _mobilenet_v2,
}


def random_network(name: str, seed: int = 0) -> nn.Module:
    """The network in eval mode, with the batch norms' statistics of eight random images, so that its values stay finite."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            model.train()(torch.randn(8, 3, 224, 224))
    return model.eval()
