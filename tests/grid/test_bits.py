from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calque.errors import SpecError
from calque.grid.bits import FLOAT, Bits, Plan, apply_overrides, check_entry, uniform

WIDTHS = st.none() | st.integers(2, 8)
BITS = st.builds(Bits, WIDTHS, WIDTHS)
# What a module path or a graph name may hold; characters outside the basic plane have a test of their own.
NAMES = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), min_size=1, max_size=12)
ODD_NAMES = st.sampled_from(
    ['a"b', "a.b", "c#2", "layer1.0.conv1", "größe", "[x]", "a = b", "\\", "", " ", "\x7f", "\n"]
)


@given(BITS)
@settings(deadline=None)
def test_bits_come_back_from_their_text(bits: Bits) -> None:
    assert Bits.parse(str(bits)) == bits


@pytest.mark.parametrize(
    ("text", "bits"),
    [("w4a8", Bits(4, 8)), ("w3", Bits(3, None)), ("a5", Bits(None, 5)), ("float", Bits(None, None))],
)
def test_bits_are_read_from_their_text(text: str, bits: Bits) -> None:
    assert Bits.parse(text) == bits


@pytest.mark.parametrize("text", ["", "8", "w", "a4w4", "w4 a4", "w4a4x", "w-4", "int8", "w4.5"])
def test_text_that_is_no_bits_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(SpecError, match=r'bits are written "w<bits>a<bits>", .* Got ' + repr(text)):
        Bits.parse(text)


@pytest.mark.parametrize(("text", "value"), [("w1a8", 1), ("w9", 9), ("w4a16", 16), ("a0", 0)])
def test_bits_out_of_range_are_refused_with_the_range(text: str, value: int) -> None:
    with pytest.raises(SpecError, match=rf"bits must be an int in \[2, 8\]\. Got {value}\."):
        Bits.parse(text)


@given(st.dictionaries(NAMES | ODD_NAMES, BITS, max_size=6))
@settings(deadline=None, max_examples=200)
def test_a_plan_comes_back_from_its_toml(entries: dict[str, Bits]) -> None:
    assert Plan.parse(Plan(entries).to_toml()) == Plan(entries)


def test_a_plan_takes_names_outside_the_basic_plane() -> None:
    plan = Plan({"\N{GRINNING FACE}": Bits(4, 4)})

    assert Plan.parse(plan.to_toml()) == plan


def test_a_plan_keeps_the_order_of_its_entries() -> None:
    names = ["z", "a", "m#2", "b.c"]

    assert list(Plan.parse(Plan(dict.fromkeys(names, Bits(4, 4))).to_toml())) == names


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    plan = Plan({"conv": Bits(4, 8), "größe": FLOAT})

    plan.save(tmp_path / "plan.toml")

    assert Plan.load(tmp_path / "plan.toml") == plan


def test_equal_plans_have_equal_hashes_whatever_their_order() -> None:
    one, other = Plan({"a": Bits(4, 4), "b": FLOAT}), Plan({"b": FLOAT, "a": Bits(4, 4)})

    assert one == other
    assert hash(one) == hash(other)
    assert one != Plan({"a": Bits(4, 4)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plan\n", "a plan is a TOML file. This one does not parse"),
        ('a = "w4a4"', r"a plan file has a table \[plan\]"),
        ("plan = 3", r"a plan file has a table \[plan\]"),
        ("[plan]\na = 4", r"plan.a must be bits as text.*Got 4"),
        ('[plan]\na = "w99"', r"bits must be an int in \[2, 8\]. Got 99"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Plan.parse(text)


def test_a_plan_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.toml")


def test_uniform_bits_except_at_the_ends() -> None:
    assert list(uniform(["a", "b", "c"], Bits(4, 4), Bits(8, 8)).values()) == [
        Bits(8, 8),
        Bits(4, 4),
        Bits(8, 8),
    ]
    assert set(uniform(["a", "b", "c"], Bits(4, 4), None).values()) == {Bits(4, 4)}
    assert uniform([], Bits(4, 4), Bits(8, 8)) == {}


ENTRIES = {"body.conv": Bits(4, 4), "body.conv#2": Bits(4, 4), "head": Bits(8, 8)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[plan]\na = 4", r"mine\.toml: plan\.a must be bits as text.*Got 4"),
        (b"[plan]\n'a b' = 'w9a9'", r"mine\.toml: plan\['a b'\]: bits must be an int in \[2, 8\]. Got 9"),
        (b"[plan]\na = 'w4a4'\na = 'w8a8'", r"mine\.toml: .*does not parse"),
        (b"[plan]\na = " + 5000 * b"[" + 5000 * b"]", r"mine\.toml: .*nested more than 64 levels"),
        (b"[plan]\na = 1" + 6000 * b"0", r"mine\.toml: .*does not parse"),
        (b"[plan]\na = 'w" + 6000 * b"4" + b"'", r"mine\.toml: plan\.a: bits are written"),
        (b"\xff", r"mine\.toml is not a text file"),
    ],
    ids=range(7),
)
def test_a_damaged_plan_names_the_file_the_entry_and_the_rule(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(content)

    with pytest.raises(SpecError, match=message) as caught:
        Plan.load(tmp_path / "mine.toml")

    assert len(str(caught.value)) < 400


def test_an_override_is_put_on_every_match_and_later_patterns_win() -> None:
    result = apply_overrides(ENTRIES, {"body.*": "w8a8", "*#2": None}, ["add"])

    assert result == {"body.conv": Bits(8, 8), "body.conv#2": FLOAT, "head": Bits(8, 8)}


def test_an_override_of_a_tensor_adds_its_entry() -> None:
    assert apply_overrides(ENTRIES, {"add": "a4"}, ["add", "cat"]) == {**ENTRIES, "add": Bits(None, 4)}


def test_an_override_leaves_its_arguments_alone() -> None:
    entries = dict(ENTRIES)

    apply_overrides(entries, {"*": None}, ["add"])

    assert entries == ENTRIES


def test_weight_bits_by_pattern_go_to_the_layers_among_the_matches() -> None:
    result = apply_overrides(ENTRIES, {"body.*": "w8a8"}, ["body.conv.output"])

    assert result == {**ENTRIES, "body.conv": Bits(8, 8), "body.conv#2": Bits(8, 8)}


def test_a_pattern_that_matches_nothing_is_refused_with_the_names() -> None:
    with pytest.raises(SpecError, match=r"'tail\.\*' matches no layer or tensor.*body\.conv, body\.conv#2, head, add"):
        apply_overrides(ENTRIES, {"tail.*": "w4a4"}, ["add"])


def test_activation_bits_alone_suit_no_layer() -> None:
    with pytest.raises(SpecError, match=r'layer head: bits must be .* Got "a8"'):
        apply_overrides(ENTRIES, {"head": "a8"}, [])


def test_weight_bits_suit_no_tensor() -> None:
    with pytest.raises(SpecError, match=r'tensor add: bits must be "a<bits>" or "float". Got "w4a4"'):
        apply_overrides(ENTRIES, {"add": "w4a4"}, ["add"])


@pytest.mark.parametrize("bits", [Bits(4, 4), Bits(4, None), FLOAT])
def test_bits_that_a_layer_can_have_pass(bits: Bits) -> None:
    assert check_entry("head", bits, is_layer=True) == bits


def test_capitals_and_spaces_around_bits_do_not_matter() -> None:
    assert Bits.parse(" W4A8 ") == Bits(4, 8)
    assert Bits.parse("Float") == Bits(None, None)
