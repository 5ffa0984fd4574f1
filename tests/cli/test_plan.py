"""`calque plan`, from prices written by hand."""

import csv
import math
import sys
from pathlib import Path

import pytest

from calque.cli import run
from calque.cli.curve import default_sweep, file_name, swept_quantity
from calque.cli.folder import Run, write_start
from calque.grid.bits import Plan
from calque.quantized.prices import Prices
from calque.report import Finalist, Report

BITS = ("w8a8", "w4a4", "w2a4")
LAYERS = ("conv1", "block.conv1", "block.conv2", "linear")


def made_prices() -> Prices:
    """Four layers whose prices rise 16 times from choice to choice; layer l weighs l + 1 times the first."""
    sizes = tuple(tuple((layer + 1) * size for size in (800, 400, 200)) for layer in range(4))
    bops = tuple(tuple((layer + 1) * 10**6 * product for product in (64, 16, 8)) for layer in range(4))
    return Prices(
        loss="kl", base="w8a8", base_loss=1e-4, groups=tuple((layer,) for layer in LAYERS), choices=(BITS,) * 4,
        increases=tuple((0.0, 0.001 * (layer + 1), 0.016 * (layer + 1)) for layer in range(4)),
        costs={"size": sizes, "bops": bops}, fixed={"size": 500, "bops": 0},
        floats={"size": 33_000, "bops": 10_240_000_000, "activation_memory": 4000},
        steps=((100, {0: (80, 40, 40), 1: (120, 60, 60)}), (0, {2: (200, 100, 100), 3: (64, 32, 32)})),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that has prices."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prices.json").write_text(made_prices().to_json())
    return tmp_path / "run"


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "pareto.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_list_of_sizes_gives_a_plan_for_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["plan", str(folder), "--size", "0.10,13%,6kB"])

    printed = capsys.readouterr().out.splitlines()
    assert code == 0
    assert printed[0].split() == [
        "budget",
        "bytes",
        "on",
        "disk",
        "of",
        "float",
        "Mbit-ops",
        "loss",
        "increase",
        "bits",
    ]
    assert [line.split("  ")[0] for line in printed[2:5]] == ["size 0.10", "size 13%", "size 6kB"]
    assert [float(row["size"]) <= limit for row, limit in zip(curve(folder), (3300, 4290, 6000), strict=True)] == [
        True
    ] * 3
    assert {path.name for path in (folder / "plans").iterdir()} == {
        "size-0.10.toml",
        "size-13pct.toml",
        "size-6kB.toml",
    }


def test_a_row_is_as_worked_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", str(folder), "--size", "4500"])  # needs a unit
    assert '"300kB" or "1.2MB"' in capsys.readouterr().err

    # all at 4 bits: 500 + 400 (1 + 2 + 3 + 4) = 4500 bytes, 16 * 10 Mbit-ops, 0.001 * 10
    run(["plan", str(folder), "--size", "4500B", "--bops", "160M"])

    row = capsys.readouterr().out.splitlines()[2]
    assert " ".join(row.split()) == "size 4500B, bops 160M 4,500 13.6% 160.0 0.01 w4a4 x4"


def test_a_plan_file_names_every_layer(folder: Path) -> None:
    run(["plan", str(folder), "--size", "0.5"])

    assert set(Plan.load(folder / "plans" / "size-0.5.toml")) == set(LAYERS)


def test_the_curve_agrees_with_the_plans(folder: Path) -> None:
    run(["plan", str(folder), "--size", "0.10,0.12"])
    prices = made_prices()

    for row in curve(folder):
        plan = Plan.load(folder / row["plan"])
        chosen = [BITS.index(str(plan[layer])) for layer in LAYERS]
        assert int(row["size"]) == 500 + sum(sizes[c] for sizes, c in zip(prices.costs["size"], chosen, strict=True))
        assert float(row["kl_increase"]) == math.fsum(p[c] for p, c in zip(prices.increases, chosen, strict=True))


def test_the_default_sweeps_from_the_smallest_size_to_the_largest(folder: Path) -> None:
    assert run(["plan", str(folder)]) == 0

    rows = curve(folder)
    assert len(rows) == 15
    assert (rows[0]["size"], rows[-1]["size"]) == ("2500", "8500")  # 500 + 10 * 200, 500 + 10 * 800
    increases = [float(row["kl_increase"]) for row in rows]
    assert increases == sorted(increases, reverse=True)
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_all_but_the_picture_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "pareto.png").write_bytes(b"of another curve")
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert run(["plan", str(folder), "--size", "0.10,0.2"]) == 0

    printed = capsys.readouterr()
    assert printed.err == "note: the curve is not drawn. matplotlib is not installed: pip install 'calque[plot]'.\n"
    assert printed.out.splitlines()[-1] == f"the plans are in {folder / 'plans'}, the curve in {folder / 'pareto.csv'}"
    assert len(curve(folder)) == 2
    assert not (folder / "pareto.png").exists()


def test_the_default_sweep_is_over_what_is_allowed() -> None:
    prices = made_prices()
    broken = Prices(**{**vars(prices), "increases": ((0.0, 0.1, math.inf), *prices.increases[1:])})

    assert next(iter(default_sweep(broken))) == "size 2700"  # the first layer cannot go below 400


def test_other_quantities_can_be_swept(folder: Path) -> None:
    assert run(["plan", str(folder), "--activation-memory", "250B,300B", "--size", "0.5"]) == 0

    assert [int(row["activation_memory"]) <= limit for row, limit in zip(curve(folder), (250, 300), strict=True)] == [
        True,
        True,
    ]


def test_the_dual_form_makes_the_cost_small(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(folder), "--max-loss", "0.0101", "--minimize", "size"]) == 0

    (row,) = curve(folder)
    assert float(row["kl_increase"]) <= 0.0101
    assert "loss 0.0101, least size" in capsys.readouterr().out


def test_a_latency_table_is_used(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    entries = [f"{layer},{bits},{bits[1]}" for layer in LAYERS for bits in BITS]
    table.write_text("\n".join(["layer,bits,milliseconds", *entries]))

    assert run(["plan", str(folder), "--latency", f"{table}=20"]) == 0
    assert float(curve(folder)[0]["latency_milliseconds"]) <= 20


def test_an_infeasible_budget_among_others_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(folder), "--size", "0.05,0.2"]) == 0

    printed = capsys.readouterr()
    assert "infeasible, size 0.05: file size at most 1,650 bytes" in printed.err
    assert len(curve(folder)) == 1


def test_only_infeasible_budgets_are_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(folder), "--size", "0.05"]) == 1

    assert "the smallest feasible is 2,500" in capsys.readouterr().err
    assert not (folder / "pareto.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--size", "0.1,0.2", "--bops", "0.1,0.2"],
            "only one option may list several values. Got lists for size and bops",
        ),
        (["--size", "0.1,,0.2"], "size as text is"),
        (["--max-loss", "0.1"], "loss and minimize come together"),
        (["--latency", "4.0"], "written table.csv=milliseconds"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["plan", str(folder), *options]) == 1

    assert message in capsys.readouterr().err


ALL_FOUR = dict.fromkeys(LAYERS, "w4a4")  # 4500 bytes, 160 Mbit-ops, + 0.01 predicted
MIXED = {**ALL_FOUR, "conv1": "w8a8"}  # 4900 bytes


@pytest.fixture
def finished(folder: Path) -> Path:
    """The folder of a run that has measured two finalists as well."""
    finalists = (Finalist(ALL_FOUR, 4500, 0.01, 0.0125, True), Finalist(MIXED, 4900, 0.009, -0.002))
    report = Report("fast", "integer", 0, 32, (), {}, 33_000, 500, {}, (), {}, loss="kl", finalists=finalists)
    settings = Run("net:build", None, "x.npy", 0, "calque", {}, {})
    (folder / "report.json").write_text(report.to_json())
    write_start(folder, settings)
    return folder


def test_measured_finalists_are_marked_in_the_table_the_curve_and_the_picture(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(finished), "--size", "3000B,4500B,6000B"]) == 0

    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == "budget bytes on disk of float Mbit-ops loss increase measured bits"
    assert printed[3] == "size 4500B 4,500 13.6% 160.0 0.01 +0.0125 w4a4 x4"
    assert printed[5] == "chosen 4,500 13.6% 160.0 0.01 +0.0125 w4a4 x4"
    assert printed[6] == "finalist 2 4,900 14.8% 208.0 0.009 -0.002 w4a4 x3, w8a8 x1"
    rows = curve(finished)
    assert [(row["budget"], row["finalist"], row["kl_measured"]) for row in rows] == [
        ("size 3000B", "", ""),
        ("size 4500B", "", "0.0125"),
        ("size 6000B", "", ""),
        ("", "chosen", "0.0125"),
        ("", "finalist 2", "-0.002"),
    ]
    assert all(set(Plan.load(finished / row["plan"])) == set(LAYERS) for row in rows)
    with_marks = (finished / "pareto.png").read_bytes()
    (finished / "run.json").unlink()
    assert run(["plan", str(finished), "--size", "3000B,4500B,6000B"]) == 0
    assert (finished / "pareto.png").read_bytes() != with_marks


def test_a_single_budget_adds_its_plan_and_leaves_the_curve(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(finished)]) == 0
    before = (finished / "pareto.csv").read_bytes(), (finished / "pareto.png").read_bytes()
    capsys.readouterr()

    assert run(["plan", str(finished), "--size", "4500B"]) == 0

    printed = capsys.readouterr().out
    assert "size 4500B" in printed
    assert "the curve of before in" in printed
    assert ((finished / "pareto.csv").read_bytes(), (finished / "pareto.png").read_bytes()) == before
    assert (finished / "plans" / "size-4500B.toml").is_file()


def test_a_single_budget_is_drawn_where_there_is_no_curve(folder: Path) -> None:
    for size in ("4500B", "3000B"):
        assert run(["plan", str(folder), "--size", size]) == 0
        assert [row["budget"] for row in curve(folder)] == [f"size {size}"]


def test_a_run_without_prices_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(tmp_path)]) == 1

    assert "has no prices.json: only runs under a budget measure prices" in capsys.readouterr().err


def test_damaged_prices_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prices.json").write_text("{")

    assert run(["plan", str(folder)]) == 1
    assert "prices.json cannot be used: not a file of prices" in capsys.readouterr().err


def test_prices_of_an_older_calque_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "prices.json"
    path.write_text(path.read_text().replace('"version": 2,', ""))

    assert run(["plan", str(folder)]) == 1
    assert "sizes in prices of version 1 are not bytes of the file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("lists", "latency", "minimize", "swept"),
    [
        ({"size": "0.1", "bops": "0.1,0.2"}, None, None, "bops"),
        ({"size": "0.1", "bops": None}, None, "bops", "bops"),
        ({"size": None, "bops": None}, "t.csv=3", None, "latency"),
        ({"size": None, "bops": None}, None, None, "size"),
    ],
)
def test_the_curve_is_over_what_varies(
    lists: dict[str, str | None], latency: str | None, minimize: str | None, swept: str
) -> None:
    assert swept_quantity(lists, latency, minimize) == swept


def test_names_of_plans_are_names_of_files() -> None:
    assert file_name("size a/b, bops ü") == "size-a-b_bops--.toml"
