"""The picture of the README: KL against seconds, three panels, without the names of the methods."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.common.rows import Row
from benchmarks.peers.cases import TOOLS
from benchmarks.peers.table import COLOURS, MARKS, by_method, mean

PANELS = {
    ("resnet20_cifar10", "w8a8"): "ResNet-20, W8A8",
    ("resnet20_cifar10", "w4a4"): "ResNet-20, W4A4",
    ("mobilenet_v1_0.25_224_imagenet", "w4a8"): "MobileNet v1, W4A8",
}
NAMES = {
    "calque": "calque",
    "brevitas": "Brevitas",
    "aimet": "AIMET",
    "mct": "Model Compression Toolkit",
    "torchao": "torchao",
    "nncf": "NNCF",
}
STYLE: Any = {  # matplotlib's type of it names each of its 300 settings
    "svg.hashsalt": "front",
    "svg.fonttype": "none",  # text stays text: readable by machines, and a third of the size
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_front(rows: list[Row], path: Path) -> None:
    """Writes the picture as SVG; nothing where no panel has a row."""
    found = {
        panel: [
            row
            for row in rows
            if (row["network"], row["bits"]) == panel and "kl" in row and "mixed" not in row["method"]
        ]
        for panel in PANELS
    }
    if not any(found.values()):
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(9.6, 3.5))
        for axis, (panel, some) in zip(axes, found.items(), strict=True):
            _panel(axis, PANELS[panel], some)
        axes[0].set_ylabel("KL to the float network, nats")
        marks = [
            Line2D(
                [], [], linestyle="", label=NAMES[tool], marker=MARKS[tool], color=COLOURS[tool], markersize=_size(tool)
            )
            for tool in TOOLS
        ]
        figure.legend(
            handles=marks, loc="upper center", ncols=len(TOOLS), frameon=False, handletextpad=0.2, columnspacing=1.2
        )
        figure.tight_layout(rect=(0, 0, 1, 0.93))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")
        plt.close(figure)


def _panel(axis: Axes, title: str, rows: list[Row]) -> None:
    for (tool, _), some in by_method(rows).items():
        axis.plot(
            mean(some, "seconds"),
            mean(some, "kl"),
            linestyle="",
            marker=MARKS[tool],
            color=COLOURS[tool],
            markersize=_size(tool),
            markeredgecolor="white",
            zorder=3 if tool == "calque" else 2,
        )
    axis.set(xscale="log", yscale="log", title=title, xlabel="seconds to quantize, one thread")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 3)))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter(NullFormatter())
    axis.margins(x=0.15, y=0.2)
    axis.grid(alpha=0.25)


def _size(tool: str) -> float:
    return 12 if tool == "calque" else 7
