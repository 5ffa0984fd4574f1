"""The demonstration that needs no download: a small residual network on digits, from training to a file."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calque.pipeline.quantize import quantize
from calque.run.extras import import_extra
from calque.run.files import write_whole
from calque.shipping.onnx import export_onnx
from calque.shipping.saved import save
from calque.shipping.verify import run_onnx, verify

BITS = ("w8a8", "w4a8", "w4a4", "w2a4")
TRAINING, CALIBRATION = 1200, 256  # images; the calibration images are training images without their labels
BRIGHTEST = 16.0  # a pixel of scikit-learn's digits
EPOCHS, BATCH, LEARNING_RATE = 8, 50, 0.02  # 98 % on the test images in a few seconds

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Digits:
    """Images (N, 1, 8, 8), scaled to [0, 1], and their labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def calibration(self) -> Tensor:
        return self.images[:CALIBRATION]


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One setting: what it costs and what is left of the float network's accuracy.

    Attributes:
        size: bytes of the packed parameters.
        float_size: of the float32 network's.
        file_bytes: of the exported file.
        float_accuracy, nearest, fast, exported: share of the test images that are recognized by the
            float network, the two recipes, and the exported file in ONNX Runtime (fast).
        agreement, agreement_exact: share of the test images on which ONNX Runtime and the simulation (the
            exact integer evaluation) have the same answer.
        seconds: to quantize (fast), export and verify.
    """

    bits: str
    size: int
    float_size: int
    file_bytes: int
    float_accuracy: float
    nearest: float
    fast: float
    exported: float
    agreement: float
    agreement_exact: float
    seconds: float


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """Three residual blocks for 8x8 images: 16, 16 and (at half the resolution) 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = Block(16, 16, stride=1)
        self.block2 = Block(16, 32, stride=2)
        self.block3 = Block(32, 32, stride=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.block3(self.block2(self.block1(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def digits(generator: torch.Generator) -> Digits:
    """scikit-learn's 1797 digits in random order, the first TRAINING of them to train on. Raises: MissingExtraError."""
    found = import_extra("demo", "sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=generator)
    images = torch.from_numpy(found.images).float()[order].unsqueeze(1) / BRIGHTEST
    labels = torch.from_numpy(found.target).long()[order]
    return Digits(images[:TRAINING], labels[:TRAINING], images[TRAINING:], labels[TRAINING:])


def train(images: Tensor, labels: Tensor, generator: torch.Generator, progress: Progress) -> DigitNet:
    """A trained network in eval mode. The caller's global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global state
        torch.random.manual_seed(generator.initial_seed())
        model = DigitNet()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5 * LEARNING_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for chosen in torch.split(order, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        progress("train", epoch + 1, EPOCHS)
    return model.eval()


def run_demo(
    folder: Path, settings: tuple[str, ...] = BITS, *, seed: int = 0, progress: Progress | None = None
) -> list[DemoRow]:
    """Trains, quantizes, exports and verifies; one row per setting.

    Args:
        folder: gets the float weights, and for each setting the quantized network and its ONNX file.
        settings: bits of the rows.
        seed: of the training images, the first weights, the order of training and the sampling.
        progress: called with (phase, steps done, steps in all).
    """
    show = progress or (lambda phase, done, total: None)
    generator = torch.Generator().manual_seed(seed)
    known = digits(generator)
    model = train(known.images, known.labels, generator, show)
    write_whole(folder / "float.safetensors", safetensors.torch.save(model.state_dict()))
    return [_row(model, known, bits, folder, seed, show) for bits in settings]


def _row(model: nn.Module, known: Digits, bits: str, folder: Path, seed: int, progress: Progress) -> DemoRow:
    def show(phase: str, done: int, total: int) -> None:
        progress(f"{bits} {phase}", done, total)

    nearest = quantize(model, known.calibration, bits=bits, recipe="nearest", seed=seed, progress=show)
    started = time.perf_counter()
    q = quantize(model, known.calibration, bits=bits, recipe="fast", seed=seed, progress=show)
    save(q, folder / f"{bits}.safetensors")
    path = folder / f"{bits}.onnx"
    export_onnx(q, path)
    checked = verify(path, q, known.test_images)
    seconds = time.perf_counter() - started
    return DemoRow(
        bits, q.report.size, q.report.float_size, checked.file_bytes,
        _accuracy(_outputs(model, known.test_images), known.test_labels),
        _accuracy(_outputs(nearest, known.test_images), known.test_labels),
        _accuracy(_outputs(q, known.test_images), known.test_labels),
        _accuracy(run_onnx(path, [known.test_images]), known.test_labels),
        checked.agreement, checked.agreement_exact, seconds,
    )  # fmt: skip


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(images)
    return result


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels).double().mean().item()
