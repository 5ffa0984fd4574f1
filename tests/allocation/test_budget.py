"""Budgets: amounts in every form, limits, the latency table, round trips."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calque.allocation.budget import Budget, nanoseconds, read_latency
from calque.errors import SpecError

FLOATS = {"size": 1000, "bops": 10**12, "activation_memory": 10**6}
TABLE = {("conv1", "w8a8"): 0.5, ("conv1", "w4a4"): 0.25}


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({"size": 0.13}, {"size": 130}),
        ({"size": 0.29}, {"size": 290}),  # 0.29 in binary is below 29 / 100
        ({"size": "13%"}, {"size": 130}),
        ({"size": "0.13"}, {"size": 130}),
        ({"size": ".29"}, {"size": 290}),
        ({"size": "1"}, {"size": 1000}),
        ({"bops": "0.25"}, {"bops": 25 * 10**10}),
        ({"bops": "1"}, {"bops": 10**12}),
        ({"bops": "2"}, {"bops": 2}),
        ({"activation_memory": "1e-3"}, {"activation_memory": 1000}),
        ({"size": 1.0}, {"size": 1000}),
        ({"size": 1}, {"size": 1}),
        ({"size": "1.2MB"}, {"size": 1_200_000}),
        ({"size": "300kB"}, {"size": 300_000}),
        ({"size": "300 KB"}, {"size": 300_000}),
        ({"activation_memory": "1GB"}, {"activation_memory": 10**9}),
        ({"activation_memory": "500B"}, {"activation_memory": 500}),
        ({"bops": "3.5G"}, {"bops": 3_500_000_000}),
        ({"bops": "200M"}, {"bops": 200_000_000}),
        ({"bops": "1e9"}, {"bops": 10**9}),
        ({"bops": 0.05, "size": 70}, {"bops": 5 * 10**10, "size": 70}),
        ({"latency": (TABLE, 4.0)}, {"latency": 4_000_000}),
        ({"latency": (TABLE, math.inf), "loss": 0.1, "minimize": "latency"}, {}),
        ({"loss": 0, "minimize": "size"}, {}),
    ],
)
def test_every_form_of_an_amount_has_its_absolute_limit(fields: dict[str, Any], limits: dict[str, int]) -> None:
    assert Budget(**fields).limits(FLOATS) == limits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a budget limits something"),
        ({"size": 0.0}, r"size must be a share in \(0, 1\].*Got 0.0"),
        ({"size": 1.5}, "size must be a share"),
        ({"size": math.nan}, "size must be a share"),
        ({"size": True}, "size must be a share"),
        ({"bops": -3}, "bops must be a share"),
        ({"size": "0%"}, "size as text"),
        ({"size": "130%"}, "size as text"),
        ({"size": "0"}, "size as text"),
        ({"size": "0.0"}, "size as text"),
        ({"size": "1.5"}, r'size as text is a share in \(0, 1\], such as "0.13" or "13%", or a number with a unit'),
        ({"size": "5"}, r'"300kB" or "1.2MB". Got \'5\''),
        ({"size": "3.5G"}, "size as text"),
        ({"bops": "3.5GB"}, '"200M" or "3.5G"'),
        ({"activation_memory": "-1MB"}, "activation_memory as text"),
        ({"loss": 0.1}, "loss and minimize come together"),
        ({"minimize": "size"}, "loss and minimize come together"),
        ({"loss": -0.1, "minimize": "size"}, "loss must be a finite number >= 0"),
        ({"loss": math.inf, "minimize": "size"}, "loss must be a finite number >= 0"),
        ({"loss": 0.1, "minimize": "speed"}, "minimize is one of size, bops, latency. Got 'speed'"),
        ({"loss": 0.1, "minimize": "latency"}, "needs latency="),
        ({"latency": "table.csv"}, "latency is a pair"),
        ({"latency": (TABLE, 0.0)}, "limit is in milliseconds, > 0"),
        ({"latency": (TABLE, math.inf)}, "finite unless latency is what is minimized"),
        ({"size": 10**30}, "an absolute int from 1 to 1,000,000,000,000,000,000,000.*Got an int of about"),
        ({"size": 10**5000}, "Got an int of about"),
        ({"size": "1e400B"}, "size as text"),
        ({"size": 5000 * "9" + "B"}, "size as text"),
        ({"bops": "1e30"}, "bops as text"),
        ({"loss": 10**400, "minimize": "size"}, "loss must be a finite number >= 0. Got an int of about"),
        ({"latency": (TABLE, 10**400)}, "limit is in milliseconds.*Got an int of about"),
        ({"latency": (TABLE, 1e12)}, "at most 1,000,000,000"),
        ({"latency": ({("conv1", "w8a8"): 1e300}, 1.0)}, "milliseconds must be at most 1,000,000,000. Got 1e[+]300"),
        ({"latency": ({("conv1", "w8a8"): 10**400}, 1.0)}, "latency of .*too large"),
        ({"latency": (7, 1.0)}, "latency's table is a CSV file or a mapping. Got int"),
        ({"latency": ({("conv1", "w8a8"): -1.0}, 1.0)}, "milliseconds must be finite and >= 0"),
    ],
)
def test_a_budget_that_breaks_a_rule_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Budget(**fields)


def test_a_share_of_an_unknown_quantity_is_refused() -> None:
    with pytest.raises(SpecError, match="activation_memory is a share of the float32 network"):
        Budget(activation_memory=0.5).limits({"size": 10})


def test_a_limit_below_one_unit_is_refused() -> None:
    with pytest.raises(SpecError, match=r"size must allow at least one unit\. Got 0.001"):
        Budget(size=0.001).limits({"size": 10})


@pytest.mark.parametrize(
    "budget",
    [
        Budget(size=0.1, bops="3G", activation_memory=3000),
        Budget(latency=(TABLE, 4.0)),
        Budget(latency=(Path("table.csv"), math.inf), loss=0.25, minimize="latency"),
    ],
)
def test_a_budget_survives_json(budget: Budget) -> None:
    text = json.dumps(budget.to_dict(), allow_nan=False)

    assert Budget.from_dict(json.loads(text)) == budget


@pytest.mark.parametrize(
    "plain",
    [
        3,
        [],
        {"weight": 3},
        {"latency": 3},
        {"latency": {}},
        {"latency": {"table": [1], "milliseconds": 2.0}},
        {"latency": {"table": [[1]], "milliseconds": 2.0}},
    ],
)
def test_what_is_no_budget_is_refused(plain: Any) -> None:
    with pytest.raises(SpecError, match="not a budget"):
        Budget.from_dict(plain)


def test_a_latency_table_is_read_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('\ufefflayer,bits,milliseconds\nconv1, w8a8 ,0.5\n\n"a,b",w4,2e-1\n', encoding="utf-8")

    assert read_latency(path) == {("conv1", "w8a8"): 0.5, ("a,b", "w4"): 0.2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header must be layer,bits,milliseconds"),
        ("layer,ms\n", "line 1: the header must be"),
        ("layer,bits,milliseconds\na,w8a8\n", "line 2: an entry is layer, bits, milliseconds"),
        ("layer,bits,milliseconds\n\na,w8a8,fast\n", "line 3: could not convert"),
        ("layer,bits,milliseconds\na,8,1\n", "line 2: bits are written"),
        ("layer,bits,milliseconds\na,w8a8,-1\n", "line 2: milliseconds must be finite and >= 0. Got '-1'"),
        ("layer,bits,milliseconds\na,w8a8,nan\n", "line 2: milliseconds must be finite"),
        ("layer,bits,milliseconds\na,w8a8,1\na,w8a8,2\n", "line 3: a, w8a8 has an entry already"),
        ("layer,bits,milliseconds\na,w8a8,\xff\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_faulty_line_of_a_latency_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode("latin-1"))

    with pytest.raises(SpecError, match=message):
        read_latency(path)


@given(st.integers(0, 10**12))
def test_whole_nanoseconds_survive_milliseconds(value: int) -> None:
    assert nanoseconds(value / 10**6) == value


@given(st.integers(1, 100), st.integers(1, 10**9))
def test_a_percentage_is_the_same_share_as_its_decimal(percent: int, size: int) -> None:
    floats = {"size": 100 * size}

    assert (
        Budget(size=f"{percent}%").limits(floats)
        == Budget(size=percent / 100).limits(floats)
        == {"size": percent * size}
    )
