"""Budgets that are solved again from the prices of a run: their names, their table and their curve."""

import csv
import io
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calque.allocation.budget import NANOSECONDS, Budget
from calque.allocation.plans import Solution, priced
from calque.cli.folder import CURVE, PICTURE, PLANS, PRICES, read_report
from calque.cli.inputs import InputError, parse_budget
from calque.errors import MissingExtraError, SpecError
from calque.grid.bits import Bits, Plan
from calque.quantized.prices import Prices
from calque.report import table_lines
from calque.run.checkpoint import RUN
from calque.run.extras import import_extra
from calque.run.files import write_whole

SWEEP = 15  # sizes that are tried where no option names any
HEADINGS = ("budget", "bytes on disk", "of float", "Mbit-ops", "loss increase", "bits")
LABELS = {
    "size": "size of the file, bytes",
    "bops": "bit-operations",
    "activation_memory": "peak activation memory, bytes",
    "latency": "latency, ms",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A budget by name, and the plan that it led to; or a finalist of the run.

    Attributes:
        measured: the increase of the loss, where a network was built with this plan and measured.
        chosen: whether that network is the run's result.
    """

    name: str
    solution: Solution
    measured: float | None = None
    chosen: bool = False


def read_finalists(folder: Path, prices: Prices) -> list[Point]:
    """The allocations that the run in `folder` built and measured. Raises: InputError."""
    if not (folder / RUN).is_file():
        return []
    found = read_report(folder).finalists
    names = ["chosen" if each.chosen else f"finalist {number}" for number, each in enumerate(found, 1)]
    return [
        Point(name, priced(prices, each.plan), each.measured, each.chosen)
        for name, each in zip(names, found, strict=True)
    ]


def marked(point: Point, finalists: list[Point]) -> Point:
    """The point with what was measured for its plan, if that is a finalist's."""
    same = next((each for each in finalists if dict(each.solution.plan) == dict(point.solution.plan)), None)
    return point if same is None else replace(point, measured=same.measured, chosen=same.chosen)


def has_curve(folder: Path) -> bool:
    """Whether there is a curve through several budgets."""
    path = folder / CURVE
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8") as file:
        return sum(bool(row["budget"]) for row in csv.DictReader(file)) > 1


def read_prices(folder: Path) -> Prices:
    """The prices of the run in `folder`. Raises: InputError."""
    path = folder / PRICES
    if not path.is_file():
        raise InputError(
            f"{folder} has no {PRICES}: only runs under a budget measure prices. Start one with "
            "calque quantize --bits w8a8,w4a4 --size 0.15."
        )
    try:
        return Prices.from_json(path.read_text(encoding="utf-8"))
    except (SpecError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be used: {error}") from error


def parse_budgets(
    lists: dict[str, str | None], latency: str | None, max_loss: float | None, minimize: str | None
) -> dict[str, Budget]:
    """Budgets by name, one per value of the list that has several; empty where no option is given.

    Raises:
        InputError: two lists of several values.  SpecError: an amount or a combination that is none.

    >>> list(parse_budgets({"size": "0.1,0.2", "bops": "3G", "activation_memory": None}, None, None, None))
    ['size 0.1, bops 3G', 'size 0.2, bops 3G']
    """
    values = {name: text.split(",") for name, text in lists.items() if text is not None}
    several = [name for name, texts in values.items() if len(texts) > 1]
    if len(several) > 1:
        raise InputError(f"only one option may list several values. Got lists for {' and '.join(several)}.")
    budgets = {}
    for number in range(max(map(len, values.values()), default=1)):
        one = {name: texts[number if name in several else 0].strip() for name, texts in values.items()}
        budget = parse_budget(
            one.get("size"), one.get("bops"), one.get("activation_memory"), latency, max_loss, minimize
        )
        if budget is not None:
            extras = {"latency": latency and latency.rpartition("=")[2], "loss": max_loss, "least": minimize}
            parts = {**one, **{name: value for name, value in extras.items() if value is not None}}
            budgets[", ".join(f"{name.replace('_', ' ')} {value}" for name, value in parts.items())] = budget
    return budgets


def default_sweep(prices: Prices) -> dict[str, Budget]:
    """Sizes at equal distances from the smallest feasible to the largest."""
    if "size" not in prices.costs:
        raise InputError(f"the prices have no sizes to sweep. Name a budget of {', '.join(prices.costs)}.")
    allowed = [
        [size for size, price in zip(sizes, increases, strict=True) if math.isfinite(price)] or [0]
        for sizes, increases in zip(prices.costs["size"], prices.increases, strict=True)
    ]
    low, high = (max(1, prices.fixed["size"] + sum(map(end, allowed))) for end in (min, max))
    sizes = sorted({low + (high - low) * step // (SWEEP - 1) for step in range(SWEEP)})
    return {f"size {size}": Budget(size=size) for size in sizes}


def swept_quantity(lists: dict[str, str | None], latency: str | None, minimize: str | None) -> str:
    """The quantity that the curve is drawn over: the list's, else what is minimized, else the first that is limited."""
    several = [name for name, text in lists.items() if text is not None and "," in text]
    limited = [name for name, text in {**lists, "latency": latency}.items() if text is not None]
    return next(iter([*several, *([minimize] if minimize else []), *limited]), "size")


def plan_table(prices: Prices, points: list[Point]) -> list[str]:
    """The lines of the table: one row per plan, with its bits counted."""
    rows: list[tuple[str, ...]] = []
    any_measured = any(point.measured is not None for point in points)
    headings = (*HEADINGS[:-1], *(["measured"] if any_measured else []), HEADINGS[-1])
    for point in points:
        costs = point.solution.costs
        size, whole, operations = costs.get("size"), prices.floats.get("size"), costs.get("bops")
        rows.append((
            point.name,
            "" if size is None else f"{size:,}",
            "" if size is None or not whole else f"{size / whole:.1%}",
            "" if operations is None else f"{operations / 1e6:,.1f}",
            f"{point.solution.increase:.3g}",
            *([_measured(point)] if any_measured else []),
            histogram(point.solution),
        ))  # fmt: skip
    return table_lines(headings, rows)


def _measured(point: Point) -> str:
    return "" if point.measured is None else f"{point.measured:+.3g}"


def histogram(solution: Solution) -> str:
    """How many layers have which bits, the most frequent first.

    >>> histogram(Solution({"a": "w4a4", "b": "w2a4", "c": "w4a4"}, 0.0, {}))
    'w4a4 x2, w2a4 x1'
    """
    return ", ".join(f"{bits} x{count}" for bits, count in Counter(solution.plan.values()).most_common())


def write_plans(folder: Path, points: list[Point]) -> None:
    """Writes a TOML file per plan, each whole."""
    (folder / PLANS).mkdir(exist_ok=True)
    for point in points:
        plan = Plan({layer: Bits.parse(bits) for layer, bits in point.solution.plan.items()})
        write_whole(folder / PLANS / file_name(point.name), plan.to_toml().encode())


def write_curve(folder: Path, prices: Prices, points: list[Point], finalists: list[Point], *, swept: str) -> None:
    """Writes the curve as a table and as a picture, each file whole.

    Raises:
        MissingExtraError: nothing draws here; the table is written, and a picture of another curve is gone.
    """
    write_whole(folder / CURVE, curve_csv(prices, points, finalists).encode())
    try:
        picture = draw_curve(prices, points, finalists, swept)
    except MissingExtraError:
        (folder / PICTURE).unlink(missing_ok=True)
        raise
    write_whole(folder / PICTURE, picture)


def file_name(name: str) -> str:
    """A file name for a budget's name.

    >>> file_name("size 13%, bops 3.5G")
    'size-13pct_bops-3.5G.toml'
    """
    plain = name.replace("%", "pct").replace(", ", "_").replace(" ", "-")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain) + ".toml"


def curve_csv(prices: Prices, points: list[Point], finalists: list[Point]) -> str:
    """The plans' costs (bytes of the file, bit-operations, milliseconds) and predicted increases as CSV, one line per budget.

    The finalists follow, each with its name in the column `finalist`, which is empty for a budget.
    """
    quantities = [name for name in LABELS if name in points[0].solution.costs]
    headings = [f"{name}_milliseconds" if name == "latency" else name for name in quantities]
    losses = [f"{prices.loss}_increase", f"{prices.loss}_measured"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["budget", *headings, "share_of_float_size", *losses, "bits", "plan", "finalist"])
    for point, names in [
        *((each, [each.name, ""]) for each in points),
        *((each, ["", each.name]) for each in finalists),
    ]:
        costs, whole = point.solution.costs, prices.floats.get("size")
        share = costs["size"] / whole if "size" in costs and whole else ""
        amounts = [in_unit(name, costs[name]) if name in costs else "" for name in quantities]
        measured = "" if point.measured is None else point.measured
        plan = f"{PLANS}/{file_name(point.name)}"
        table.writerow([
            names[0], *amounts, share, point.solution.increase, measured, histogram(point.solution), plan, names[1]
        ])  # fmt: skip
    return text.getvalue()


def in_unit(name: str, cost: int) -> float:
    """A cost in the unit that users see: latencies in milliseconds, all else as it is."""
    return cost / NANOSECONDS if name == "latency" else cost


def draw_curve(prices: Prices, points: list[Point], finalists: list[Point], swept: str) -> bytes:
    """A PNG of the predicted increase of the loss over the swept cost, and of the measured one of finalists.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pairs = sorted((in_unit(swept, point.solution.costs[swept]), point.solution.increase) for point in points)
    costs, increases = [cost for cost, _ in pairs], [increase for _, increase in pairs]
    import_extra("plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(costs, increases, marker="o", markersize=4, linewidth=1.2, label="predicted")
    for point in finalists:
        if swept in point.solution.costs and point.measured is not None:
            at, label = in_unit(swept, point.solution.costs[swept]), f"{point.name}, measured"
            axes.plot([at], [point.measured], marker="*" if point.chosen else "x", linestyle="", label=label)
            increases.append(point.measured)
    axes.legend()
    positive = [increase for increase in increases if increase > 0]
    if positive == increases:
        axes.set_yscale("log")
    elif positive:
        axes.set_yscale("symlog", linthresh=min(positive))  # linear down to the zero, which has no logarithm
    axes.set_xlabel(LABELS[swept])
    axes.set_ylabel(f"increase of the loss ({prices.loss})")
    axes.grid(visible=True, alpha=0.3)
    whole = prices.floats.get(swept)
    if whole:
        share = axes.secondary_xaxis(
            "top", functions=(lambda cost: np.multiply(cost, 100 / whole), lambda part: np.multiply(part, whole / 100))
        )
        share.set_xlabel("% of float32")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
