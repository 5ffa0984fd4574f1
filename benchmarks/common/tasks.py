"""What the benchmarks quantize: the zoo in ../shared, and small networks trained here that no one tuned calque on."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import calque
from calque.quantized.model import QuantizedModel

SHARED = Path(__file__).resolve().parents[3] / "shared"


@dataclass(frozen=True)
class Setting:
    """How one network is measured: how many calibration and test inputs, and the axes that change."""

    name: str
    calibration: int
    test: int
    dynamic: dict[str, dict[int, Any]] | None = None


_FREE = torch.export.Dim.AUTO
SETTINGS = (
    Setting("resnet20_cifar10", 1024, 1000),
    Setting("mobilenet_v1_0.25_224_imagenet", 256, 1300),
    Setting("dncnn_s25", 64, 12, {"x": {2: _FREE, 3: _FREE}}),
    Setting("squeezenet1_1_imagenet", 256, 400),
    Setting("efficientnet_lite0_imagenet", 256, 100),
    Setting("resnet32_cifar10", 1024, 1000),
    Setting("digits_depthwise", 256, 597),
    Setting("digits_mlp", 256, 597),
)


@dataclass(frozen=True)
class Task:
    """A float network with its inputs and its metric; the zoo's tasks have the same fields."""

    name: str
    model: nn.Module
    calibration: Tensor
    test: Tensor
    metric: str
    score_outputs: Callable[[Tensor], float]
    classifier: bool


class Depthwise(nn.Module):
    """Inverted bottlenecks with SiLU, a concatenation, an average pool and a functional convolution, for 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.expand = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.kernel = nn.Parameter(torch.randn(32, 16, 3, 3) * 0.1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        y = F.relu(F.conv2d(x, self.kernel, padding=2, dilation=2))
        return self.head(F.avg_pool2d(torch.cat([x, y], 1), 8).flatten(1))  # type: ignore[no-any-return]


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 96),
        nn.BatchNorm1d(96),
        nn.GELU(),
        nn.Linear(96, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _digits(name: str, build: Callable[[], nn.Module], seed: int = 0) -> Task:
    """A network trained for 30 epochs on 1200 of scikit-learn's digits; the other 597 test it."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        for _ in range(30):
            for batch in torch.split(torch.randperm(1200), 60):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    test = labels[1200:]

    def accuracy(outputs: Tensor) -> float:
        return 100 * (outputs.argmax(1) == test[: len(outputs)]).double().mean().item()

    return Task(name, model.eval(), images[:1200], images[1200:], "top1 %", accuracy, True)


def load(name: str) -> Any:
    """The task of that name, from the zoo or trained here.

    Raises:
        FileNotFoundError: a task of the zoo where ../shared is absent.
    """
    if name == "digits_depthwise":
        return _digits(name, Depthwise)
    if name == "digits_mlp":
        return _digits(name, _mlp)
    if not (SHARED / "zoo").is_dir():
        raise FileNotFoundError(f"{name} needs the weights and data in {SHARED}, which is absent.")
    sys.path.insert(0, str(SHARED))
    from zoo import load as load_from_zoo

    return load_from_zoo(name)


def quantize(model: nn.Module, calibration: object, **options: Any) -> QuantizedModel:
    """`calque.quantize` without warnings of few images: the report has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", calque.errors.CalibrationWarning)
        return calque.quantize(model, calibration, **options)


def score(task: Any, outputs: Tensor) -> float:
    """The task's metric; on the first len(outputs) ImageNet images where the outputs are fewer than the test set."""
    if len(outputs) == len(task.test):
        return float(task.score_outputs(outputs))
    from zoo.tasks import imagenet_pixels, top1

    return float(top1(imagenet_pixels("val")[1][: len(outputs)])(outputs))
