"""The networks of benchmarks.memory: small ones of four kinds, with random weights, for images of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, a batch norm and a ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _classifier(*features: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, outputs, stride=stride), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        )
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.body(x)) + self.shortcut(x))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        wide = 4 * inputs
        self.body = nn.Sequential(
            _convolution(inputs, wide, kernel=1), _convolution(wide, wide, stride=stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class _EncoderDecoder(nn.Module):
    """Long skips, and an output as large as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.middle, self.coarse = (
            _convolution(3, 16), _convolution(16, 32, stride=2), _convolution(32, 64, stride=2)
        )  # fmt: skip
        self.up, self.last, self.head = _convolution(96, 32), _convolution(48, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        middle = self.middle(fine)
        y = self.up(torch.cat([F.interpolate(self.coarse(middle), scale_factor=2.0), middle], 1))
        y = self.last(torch.cat([F.interpolate(y, scale_factor=2.0), fine], 1))
        found: Tensor = self.head(y)
        return found


def _plain() -> nn.Module:
    return _classifier(
        _convolution(3, 16), _convolution(16, 32, stride=2), _convolution(32, 32), nn.MaxPool2d(2),
        _convolution(32, 64), _convolution(64, 64), channels=64,
    )  # fmt: skip


def _residual() -> nn.Module:
    return _classifier(
        _convolution(3, 32), _Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 64, 1), channels=64
    )


def _depthwise() -> nn.Module:
    blocks = [_Inverted(*shape) for shape in ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 48, 2), (48, 48, 1))]
    return _classifier(_convolution(3, 16, stride=2), *blocks, channels=48)


MODELS = {
    "residual": _residual, "plain": _plain, "depthwise": _depthwise, "encoder_decoder": _EncoderDecoder,
}  # fmt: skip


def random_model(name: str) -> nn.Module:
    """A network of that name in eval mode, always with the same weights and statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()
