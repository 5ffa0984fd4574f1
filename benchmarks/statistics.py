"""Para-normalization on a planted shift: python -m benchmarks.statistics

A random gain and offset is absorbed into every channel of a trained float network; para-normalization estimates on one part of
the images, and what is left of the shift is measured on others. The table benchmarks/results/statistics.md is written whole.
"""

import argparse
import copy
import platform
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.common.measure import BATCH, commit, fidelity
from benchmarks.common.rows import RESULTS
from benchmarks.common.tasks import SETTINGS, load, score
from calque.calibration.batches import prepare
from calque.calibration.channel_statistics import ChannelStatistics, trained_statistics
from calque.calibration.execution import Execution
from calque.correction.normalization import absorb, para_normalize
from calque.network import Batch, Network, Signature, WeightedLayer, capture
from calque.run.spill import Store

NETWORKS = ("resnet20_cifar10", "mobilenet_v1_0.25_224_imagenet", "digits_depthwise")
SEEDS = (0, 1, 2)
GAIN, OFFSET = (0.6, 1.6), 1.0  # of the planted shift; the offset in standard deviations of the channel
DEAD = 1e-4  # channels of a smaller deviation, as a share of the layer's, are left out: they are float32's rounding
LARGEST_RATIO = 1e4  # of variances: a planted shift may silence a channel behind it altogether
MEMORY = 2 * 10**9
TABLE = RESULTS / "statistics.md"

Statistics = Mapping[str, ChannelStatistics]


@dataclass(frozen=True, slots=True)
class Row:
    """One planted shift and what a target left of it.

    Attributes:
        mean_*: root mean square over all channels of the difference from the target, in standard deviations of the float
            channel; variance_*: of the logarithm of the ratio. resampled: the float network on B against itself on A;
            planted, left: the shifted and the restored network on B against the target. float: the restored network against the
            float one, both on B.
        kl_*: KL(float || shifted or restored) in nats, and score_*: the task's metric, on B.
    """

    network: str
    target: str
    seed: str
    mean_resampled: float
    mean_planted: float
    mean_left: float
    mean_float: float
    variance_resampled: float
    variance_planted: float
    variance_left: float
    variance_float: float
    kl_planted: float
    kl_left: float
    score: float
    score_planted: float
    score_left: float


class Bench:
    """One network, captured, with its statistics on A (calibration images) and on B (test images)."""

    def __init__(self, name: str):
        setting = next(setting for setting in SETTINGS if setting.name == name)
        self.name, self.task = name, load(name)
        signature = Signature.of(self.task.model)
        self.test = self.task.test[: setting.test]
        self.first = prepare(self.task.calibration[: setting.calibration], signature, torch.device("cpu"))
        self.second = prepare(self.test, signature, torch.device("cpu"))
        self.network: Network = capture(self.task.model, self.first[0])
        self.on_first = measured(self.network.module, self.first, list(self.network.layers))
        self.on_second = measured(self.network.module, self.second, list(self.network.layers))
        self.reference = outputs(self.network.module, self.test)
        self.targets = {"float": self.on_first, "trained": trained_statistics(self.network)}

    def row(self, target: str, seed: int) -> Row:
        """The shift is in the layers that the target has."""
        goal = self.targets[target]
        shifted = plant(self.network, {name: self.on_first[name] for name in goal}, seed)
        restored = copy.deepcopy(shifted)
        with Store(MEMORY) as store:
            para_normalize(restored, goal, self.first, store)
        before, after = (measured(module, self.second, list(goal)) for module in (shifted, restored))
        means, variances = zip(
            self.apart(self.on_second, self.on_first, goal), self.apart(before, goal, goal), self.apart(after, goal, goal),
            self.apart(after, self.on_second, goal), strict=True,
        )  # fmt: skip
        results = [outputs(module, self.test) for module in (shifted, restored)]
        kl = [fidelity(self.reference, result, self.task.classifier)["kl"] for result in results]
        scores = [score(self.task, result) for result in (self.reference, *results)]
        return Row(self.name, target, str(seed), *means, *variances, *kl, *scores)

    def apart(self, now: Statistics, then: Statistics, names: Statistics) -> tuple[float, float]:
        """How far the means are apart, in deviations of the float channel on A, and the variances, by their log ratio."""
        means, variances = [], []
        for name in names:
            alive = self.alive(name)
            deviation = self.on_first[name].variance.sqrt()
            means.append(((now[name].mean - then[name].mean) / deviation)[alive])
            ratio = (now[name].variance / then[name].variance).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
            variances.append(ratio.log()[alive])
        return rms(torch.cat(means)), rms(torch.cat(variances))

    def alive(self, name: str) -> Tensor:
        """Which channels vary on A."""
        deviation = self.on_first[name].variance.sqrt()
        return deviation > DEAD * deviation.square().mean().sqrt()

    def facts(self) -> str:
        dead = sum(int((~self.alive(name)).sum()) for name in self.network.layers)
        channels = sum(len(each.mean) for each in self.on_first.values())
        return (
            f"{self.name}: {sum(map(count, self.first))} images A, {len(self.test)} images B, "
            f"{len(self.network.layers)} layers, {len(self.targets['trained'])} with a batch norm; {dead} of {channels} "
            "channels do not vary and are left out"
        )


def count(batch: Batch) -> int:
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def plant(network: Network, statistics: Statistics, seed: int) -> fx.GraphModule:
    """The network with each channel's deviation times a random gain and its mean moved by a random offset."""
    module = copy.deepcopy(network.module)
    for name, now in statistics.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        gain, offset = torch.rand(2, len(now.mean), dtype=torch.float64, generator=generator)
        gain = GAIN[0] + (GAIN[1] - GAIN[0]) * gain
        offset = OFFSET * (2 * offset - 1) * now.variance.sqrt()
        layer = network.weighted(name)
        module.set_submodule(name, absorb(layer, gain, offset + (1 - gain) * now.mean))  # the gain is about the mean
    return module


def measured(module: fx.GraphModule, batches: list[Batch], names: list[str]) -> dict[str, ChannelStatistics]:
    """The statistics of these layers' outputs on the batches."""
    found = {}
    with Store(MEMORY) as store:
        execution = Execution(module, batches, store)
        for node in module.graph.nodes:
            if node.op == "output":
                break
            execution.step(node)
            if str(node.target) in names:
                layer = module.get_submodule(str(node.target))
                assert isinstance(layer, WeightedLayer)
                found[str(node.target)] = ChannelStatistics.of(execution.values(node), layer.geometry)
            execution.release(node)
    return found


@torch.no_grad()
def outputs(module: fx.GraphModule, images: Tensor) -> Tensor:
    return torch.cat([module(part)[0] for part in torch.split(images, BATCH)])


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    rows: list[Row] = []
    facts = []
    started = time.perf_counter()
    for name in arguments.networks:
        bench = Bench(name)
        facts.append(bench.facts())
        for target in bench.targets:
            for seed in arguments.seeds:
                rows.append(bench.row(target, seed))
                print(" | ".join(cells(rows[-1])), flush=True)
    arguments.table.write_text(table(rows, facts, time.perf_counter() - started), encoding="utf-8")


HEADINGS = ("network", "target", "seed", "mean: resampled", "planted", "left", "from float", "variance: resampled", "planted",
            "left", "from float", "KL: planted", "restored", "score: float", "planted", "restored")  # fmt: skip


def table(rows: list[Row], facts: list[str], seconds: float) -> str:
    """The rows as Markdown, and the means over seeds."""
    lines = [
        "# Para-normalization on a planted shift",
        "",
        f"Written by `python -m benchmarks.statistics`; commit {commit()}; {platform.machine()}, {torch.get_num_threads()} "
        f"thread{'s' * (torch.get_num_threads() > 1)}; {seconds:.0f} s in all.",
        "",
        f"Every output channel of a float network gets a random gain in [{GAIN[0]}, {GAIN[1]}] about its mean and an offset of",
        f"up to {OFFSET:g} standard deviation, absorbed into the layer, in all layers that have the target: *float* (the float",
        "network's statistics on A) or *trained* (the batch norm's, as in the paper). Para-normalization estimates on A",
        "(calibration images); everything below is measured on B (test images). Root mean square over all channels of the",
        "difference of means, in standard deviations of the float channel, and of the logarithm of the ratio of variances",
        f"(limited to {LARGEST_RATIO:g} either way: a shift may silence a channel behind it):",
        "*resampled*: float network, B against A; *planted* and *left*: shifted and restored network on B against the target;",
        "*from float*: restored network against the float network, both on B. Where para-normalization removes all of the shift,",
        "*left* equals *resampled*. KL(float || network) in nats and the score in % are of the whole network on B.",
        "",
        *(f"- {fact}." for fact in facts),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.target), []).append(row)
    return "\n".join([*lines, *("| " + " | ".join(cells(mean(group))) + " |" for group in groups.values())]) + "\n"


def mean(rows: list[Row]) -> Row:
    """The mean of a network's rows for one target."""
    numbers: list[Any] = [sum(getattr(row, field.name) for row in rows) / len(rows) for field in fields(Row)[3:]]
    return Row(rows[0].network, rows[0].target, "mean", *numbers)


def cells(row: Row) -> list[str]:
    values = [getattr(row, field.name) for field in fields(Row)]
    return [*values[:3], *(f"{value:.4f}" for value in values[3:-3]), *(f"{value:.2f}" for value in values[-3:])]


if __name__ == "__main__":
    main()
