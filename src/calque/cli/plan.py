"""`calque plan`: solves again from the prices of a run, without measuring again; draws the Pareto curve."""

from pathlib import Path
from typing import Annotated

import typer

from calque.cli.terminal import complain
from calque.errors import InfeasibleBudgetError, MissingExtraError


def plan_command(
    run: Annotated[Path, typer.Argument(help="the folder of a run under a budget", metavar="RUN")],
    size: Annotated[str | None, typer.Option(help="of the file: fractions of float32, or 300kB,1.2MB")] = None,
    bops: Annotated[str | None, typer.Option(help="bit-operations: fractions, or 200M,3.5G")] = None,
    activation_memory: Annotated[str | None, typer.Option(help="live activations: fractions, or 300kB")] = None,
    latency: Annotated[str | None, typer.Option(help="by your table: table.csv=4.0 (milliseconds)")] = None,
    max_loss: Annotated[float | None, typer.Option(help="dual form: the most that the loss may rise")] = None,
    minimize: Annotated[str | None, typer.Option(help="dual form: size, bops or latency")] = None,
) -> None:
    """Solves other budgets from the prices of a run; writes their plans and the Pareto curve, on which finalists are marked.

    A single budget leaves a curve of several as it is.
    """
    from calque.allocation.highs import own_output
    from calque.allocation.plans import Solution, pareto
    from calque.cli.curve import (
        Point,
        default_sweep,
        has_curve,
        marked,
        parse_budgets,
        plan_table,
        read_finalists,
        read_prices,
        swept_quantity,
        write_curve,
        write_plans,
    )
    from calque.cli.folder import CURVE, PICTURE, PLANS

    prices = read_prices(run)
    lists = {"size": size, "bops": bops, "activation_memory": activation_memory}
    budgets = parse_budgets(lists, latency, max_loss, minimize) or default_sweep(prices)
    with own_output():
        results = pareto(prices, list(budgets.values()))
    points = [Point(name, found) for name, found in zip(budgets, results, strict=True) if isinstance(found, Solution)]
    failures = {
        name: found for name, found in zip(budgets, results, strict=True) if isinstance(found, InfeasibleBudgetError)
    }
    if not points:
        raise next(iter(failures.values()))
    finalists = read_finalists(run, prices)
    points = [marked(point, finalists) for point in points]
    write_plans(run, [*points, *finalists])
    kept = len(points) == 1 and has_curve(run)
    if not kept:
        try:
            write_curve(run, prices, points, finalists, swept=swept_quantity(lists, latency, minimize))
        except MissingExtraError as missing:
            complain("note", f"the curve is not drawn. {missing}")
    for line in plan_table(prices, [*points, *finalists]):
        print(line)
    for name, error in failures.items():
        complain(f"infeasible, {name}", str(error))
    curves = " and ".join(str(run / name) for name in (CURVE, PICTURE) if (run / name).is_file())
    print(f"the plans are in {run / PLANS}, the curve{' of before' if kept else ''} in {curves}")
