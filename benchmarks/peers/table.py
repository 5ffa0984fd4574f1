"""The rows as Markdown and as a plot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from benchmarks.common.rows import Row
from benchmarks.peers.cases import SETTINGS, TOOLS, cases

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADINGS = ("tool", "method", "placement", "seeds", "KL", "score", "agreement", "seconds", "float passes", "peak +MB",
            "settings")  # fmt: skip
COLOURS = dict(zip(TOOLS, ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown"), strict=True))
MARKS = dict(zip(TOOLS, "*osD^v", strict=True))
PLACES = tuple(
    (side * x, y)
    for x, y in ((8, 0), (12, 12), (12, -12), (16, 24), (16, -24), (20, 36), (20, -36), (24, 48), (24, -48))
    for side in (1, -1)
)
Point = tuple[str, str, float, float]
INTRODUCTION = """# calque beside its peers

Written by `python -m benchmarks.peers`: each tool in its own environment, every row a process of its own on one thread, all on
the same float network, images and bits. KL(float || quantized) in nats, top-1 score and agreement with the float network on test
inputs, computed by one program from the logits that each tool's simulation gave. *Seconds* are the processor's in the call that
quantizes, loading excluded (on an idle machine the clock's; others may have shared the machine); *float passes* are seconds over
those of one float pass over the same calibration images in the same process; *peak* is the rise of peak memory over the moment
before. Rows of several seeds: mean, and the least and the greatest KL.

Placement *common*: image input, first and last layer (weights and inputs) at 8 bits, the other layers' inputs at the bits named,
operands and results of residual adds and what a mean reads at 8 bits, requantized in front of a layer of fewer; weights
symmetric per channel, activations asymmetric per tensor; calque's placement `integer`. Scores on these subsets compare float and
quantized networks; they are no published benchmark's.

Settings are each tool's own where the last column names none, with exceptions in the tools' favour: activation grids by
squared error in AIMET and below 8 bits in Brevitas, rate 0.01 of Brevitas' learned rounding (untuned). AIMET's was the best
of four of its criteria on resnet20 W4A4, judged on calibration images alone: ranges from 128 of them, KL on the 896 others
(.072; its default .077, percentile 99.9 .083, extremes .167; standard errors .015 to .025). Reduced for time: AIMET's
AdaRound (its default is 15,000 iterations below 8 bits) where the method's name says so, Model Compression Toolkit's epochs,
and its Hessian scores in *-mse*. AIMET 2.42 and PT2E have no bias correction, which depthwise networks feel at every width;
cross-layer equalization, which AIMET and Brevitas advise for them, passes no ReLU6, which the two here have. PT2E has no
method that fits weights; NNCF quantizes activations to 8 bits.

Methods named *mixed* choose 8, 4, 3 or 2 bits for the weights of each layer between the first and the last, in no more bytes
than the bits that head the section take everywhere (packed weights, scales and biases not counted; calque's budget
bounds the file since), activations at the bits that head it. Beside them: the same bits everywhere. The
settings list the bits in the order of the layers.

Model Compression Toolkit's gradient PTQ without Hessian scores runs with a regularization of 1e-6, not its default of 0.01. That
term is a sum over all weights beside a mean of relative errors: on resnet20 W4A4 it starts at 2,500 where the errors are .003,
so rounding follows it and hardly the outputs. On 128 calibration images and 160 steps the KL on the 896 others is .061 at the
default, .051 at 1e-5 and .037 at 1e-6, with activations quantized from the first step .038 at 1e-5, .044 at 1e-6 and .040 at
1e-7; its plain PTQ has .062. With Hessian scores its settings are its own.
"""


def groups(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Network, bits and rows, in the order of the cases."""
    order = list(dict.fromkeys((key[0], key[1]) for key in cases()))
    for network, bits in sorted(order, key=lambda pair: list(SETTINGS).index(pair[0])):
        found = [row for row in rows if (row["network"], row["bits"]) == (network, bits)]
        if found:
            yield network, bits, found


def by_method(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each tool and method, tools in their order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (TOOLS.index(row["tool"]), row["method"], row["seed"])):
        found.setdefault((row["tool"], row["method"]), []).append(row)
    return found


def mean(rows: list[Row], field: str) -> float:
    return float(sum(row[field] for row in rows) / len(rows))


def table(rows: list[Row]) -> str:
    """The rows as Markdown, a section for each network and bits."""
    lines = [INTRODUCTION]
    versions = sorted({f"{name} {number}" for row in rows for name, number in row.get("versions", {}).items()})
    commits = sorted({row["commit"] for row in rows})
    lines += [f"Versions: {', '.join(versions)}; commit {', '.join(commits)}.", "", "![KL against seconds](peers.svg)"]
    for network, bits, found in groups(rows):
        good = [row for row in found if "kl" in row]
        lines += ["", f"## {network}, {bits}", ""]
        if good:
            first = good[0]
            lines += [
                f"{first['calibration']} calibration images, {first['test']} test images; float score "
                f"{first['score_float']:.2f}; one float pass {mean(good, 'float_pass'):.2f} s.",
                "",
                "| " + " | ".join(HEADINGS) + " |",
                "|" + "---|" * len(HEADINGS),
            ]
        lines += ["| " + " | ".join(cells(some)) + " |" for some in by_method(good).values()]
        failed = [row for row in found if "failed" in row]
        lines += ["", *(f"- {row['tool']} {row['method']}, seed {row['seed']}: {row['failed']}" for row in failed)]
        done = {(row["tool"], row["method"], row["seed"]) for row in found}
        left = [key[2:] for key in cases() if key[:2] == (network, bits) and key[2:] not in done]
        if left:
            lines += ["", f"Not measured: {', '.join(' '.join(map(str, rest)) for rest in left)}."]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def cells(rows: list[Row]) -> list[str]:
    first = rows[0]
    values = [row["kl"] for row in rows]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(rows) > 1 else ""
    settings = first["settings"]
    if first.get("bytes"):
        settings += f"; {first['bytes']:,} bytes"
    return [
        first["tool"], first["method"], first["placement"], " ".join(str(row["seed"]) for row in rows),
        f"{mean(rows, 'kl'):.4f}{spread}", f"{mean(rows, 'score'):.2f}", f"{mean(rows, 'agreement'):.1%}",
        f"{mean(rows, 'seconds'):.1f}", f"{mean(rows, 'passes'):.0f}", f"{max(row['peak'] for row in rows) / 1e6:.0f}",
        settings,
    ]  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """KL against seconds, a panel for each network and bits, a point for each tool and method."""
    panels = list(groups([row for row in rows if "kl" in row]))
    if not panels:
        return
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(5.5 * columns, 4.2 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    drawn = [_points(axis, *panel) for axis, panel in zip(axes.flat, panels, strict=False)]
    tools = [Line2D([], [], linestyle="", label=tool, **_style(tool)) for tool in TOOLS]
    figure.legend(handles=tools, loc="upper center", ncols=len(tools), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (4.2 * height)))  # 0.3 inches for the legend
    for axis, points in zip(axes.flat, drawn, strict=False):
        label_points(axis, points)
    with plt.rc_context({"svg.hashsalt": "peers"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _style(tool: str) -> dict[str, Any]:
    """A mark and a colour of its own; calque's is the larger, with a black edge."""
    emphasis = {"markersize": 13, "markeredgecolor": "black"} if tool == "calque" else {"markersize": 6}
    return {"marker": MARKS[tool], "color": COLOURS[tool], **emphasis}


def _points(axis: Axes, network: str, bits: str, rows: list[Row]) -> list[Point]:
    """Draws one panel's points and returns them: tool, method, seconds, KL."""
    points = [
        (tool, method, mean(some, "seconds"), max(mean(some, "kl"), 1e-4))
        for (tool, method), some in by_method(rows).items()
    ]
    for tool, _, x, y in points:
        axis.plot(x, y, **_style(tool))
    axis.set(xscale="log", yscale="log", title=f"{network}, {bits}")
    axis.set(xlabel="processor seconds of quantization", ylabel="KL(float || quantized) in nats")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter(NullFormatter())
    axis.margins(0.2)
    axis.grid(alpha=0.3, which="both")
    return points


def label_points(axis: Axes, points: list[Point]) -> None:
    """Writes the methods beside their points, each at the nearest place that covers no point and no other label."""
    renderer = axis.figure.canvas.get_renderer()  # type: ignore[attr-defined] # Agg's canvas has one
    marks = axis.transData.transform([point[2:] for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in marks]
    for tool, method, *values in points:
        at = (values[0], values[1])
        for place, (x, y) in enumerate(PLACES):
            label = axis.annotate(
                method, at, xytext=(x, y), textcoords="offset points", fontsize=8, va="center", ha="left" if x > 0 else "right",
                weight="bold" if tool == "calque" else "normal", color=COLOURS[tool],
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": COLOURS[tool]} if place > 1 else None,
            )  # fmt: skip
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # an annotation's own extent contains its line
            if not box.count_overlaps(taken) and all(axis.bbox.contains(*corner) for corner in (box.min, box.max)):
                break
            if place < len(PLACES) - 1:
                label.remove()
        taken.append(box)
