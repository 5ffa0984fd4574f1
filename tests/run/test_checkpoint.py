"""Pieces of a run on disk: round trips, damage, and folders that are not this run's."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processes import dead_process

from calque.errors import SpecError
from calque.run.checkpoint import IDENTITY, Checkpoint, Piece, alone, fingerprint, open_run
from calque.run.processes import host

IDENTITY_OF_A_RUN = {"weights": "00ff", "seed": "0", "recipe": "name = 'light'"}
DTYPES = (torch.float32, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool, torch.bfloat16)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(DTYPES),
    key=st.text(min_size=1, max_size=120),
    facts=st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), max_size=3
    ),
)
@settings(deadline=None, max_examples=60)
def test_a_piece_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, key: str, facts: dict[str, object]
) -> None:
    kept = Checkpoint(tmp_path_factory.mktemp("run"))
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)

    kept.put(key, Piece({"codes": tensor, "none": torch.zeros(0)}, facts))
    piece = kept.get(key)

    assert piece is not None
    assert piece.facts == facts
    assert piece.tensors.keys() == {"codes", "none"}
    assert piece.tensors["codes"].dtype == dtype
    assert torch.equal(piece.tensors["codes"], tensor)


def test_losses_that_are_not_finite_survive_their_file(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path)
    kept.put("prices 0", Piece({}, {"losses": [math.inf, -math.inf, math.nan, 0.1]}))

    piece = kept.get("prices 0")

    assert piece is not None
    assert repr(piece.facts["losses"]) == "[inf, -inf, nan, 0.1]"


def test_views_that_share_memory_are_kept_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    kept = Checkpoint(tmp_path)

    kept.put("x", Piece({"rows": whole[1:], "columns": whole.T, "same": whole}, {}))

    piece = kept.get("x")
    assert piece is not None
    assert torch.equal(piece.tensors["rows"], whole[1:])
    assert torch.equal(piece.tensors["columns"], whole.T)


def test_what_was_never_put_is_missing(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path).get("layer conv1") is None


def test_keys_that_look_alike_in_a_file_name_have_files_of_their_own(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path)
    keys = ["a b", "a/b", "a:b", "x" * 100 + "1", "x" * 100 + "2"]
    for number, key in enumerate(keys):
        kept.put(key, Piece({}, {"number": number}))

    found = [kept.get(key) for key in keys]

    assert [piece and piece.facts["number"] for piece in found] == list(range(5))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped header", "no facts"])
def test_a_damaged_file_is_missing_and_can_be_made_again(tmp_path: Path, damage: str) -> None:
    kept = Checkpoint(tmp_path)
    piece = Piece({"x": torch.arange(100.0)}, {"error": 0.5})
    kept.put("layer", piece)
    path = kept.path("layer")
    content = path.read_bytes()
    spoiled = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "text": b"not a file of tensors",
        "flipped header": b"\xff" * 8 + content[8:],
        "no facts": content.replace(b"facts", b"stats"),
    }
    path.write_bytes(spoiled[damage])

    assert kept.get("layer") is None
    kept.put("layer", piece)
    again = kept.get("layer")
    assert again is not None
    assert torch.equal(again.tensors["x"], piece.tensors["x"])


def test_a_checkpoint_without_a_folder_keeps_nothing_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = Checkpoint(None).within("fits")

    nowhere.put("layer", Piece({"x": torch.ones(2)}, {}))

    assert nowhere.get("layer") is None
    assert not list(tmp_path.iterdir())


def test_a_folder_within_has_pieces_of_its_own(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path)
    inner = kept.within("fits")
    inner.put("layer", Piece({}, {"where": "inside"}))

    assert kept.get("layer") is None
    again = kept.within("fits").get("layer")
    assert again is not None
    assert again.facts == {"where": "inside"}


PIECE = Piece({"x": torch.arange(100.0), "y": torch.arange(3)}, {"error": 0.5, "names": ["a"]}, {"before": "00ff"})


def test_one_flipped_bit_anywhere_in_a_file_is_seen(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path)
    kept.put("layer", PIECE)
    path = kept.path("layer")
    content = path.read_bytes()
    unseen = []
    for position in range(len(content)):
        for bit in (0, 3, 7):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            piece = kept.get("layer", PIECE.needs)
            if piece is not None and piece.checksum != PIECE.checksum:
                unseen.append((position, bit))

    assert not unseen
    path.write_bytes(content)
    assert kept.get("layer", PIECE.needs) is not None


def test_a_checksum_sees_all_that_is_in_a_piece() -> None:
    others = [
        Piece({**PIECE.tensors, "x": torch.arange(100.0) + torch.eye(1, 100)[0] * 1e-6}, PIECE.facts, PIECE.needs),
        Piece({**PIECE.tensors, "x": torch.arange(100.0).reshape(10, 10)}, PIECE.facts, PIECE.needs),
        Piece({**PIECE.tensors, "z": torch.zeros(0)}, PIECE.facts, PIECE.needs),
        Piece(PIECE.tensors, {**PIECE.facts, "error": 0.25}, PIECE.needs),
        Piece(PIECE.tensors, PIECE.facts, {"before": "00fe"}),
        Piece(PIECE.tensors, PIECE.facts),
    ]

    assert len({PIECE.checksum, *(other.checksum for other in others)}) == len(others) + 1


@pytest.mark.parametrize("needs", [None, {}, {"before": "00fe"}, {"after": "00ff"}, {"before": "00ff", "fit": "1"}])
def test_a_piece_that_was_computed_from_others_is_missing(tmp_path: Path, needs: dict[str, str] | None) -> None:
    kept = Checkpoint(tmp_path)
    kept.put("layer", PIECE)

    assert kept.get("layer", needs) is None
    assert kept.get("layer", {"before": "00ff"}) is not None


def test_a_piece_under_another_key_or_of_another_run_is_missing(tmp_path: Path) -> None:
    first = open_run(tmp_path / "first", IDENTITY_OF_A_RUN)
    other = open_run(tmp_path / "other", {**IDENTITY_OF_A_RUN, "seed": "1"})
    first.put("layer", Piece({}, {"error": 1.0}))
    first.path("layer").rename(first.path("layer2"))

    assert first.get("layer2") is None
    first.put("layer", Piece({}, {"error": 1.0}))
    other.path("layer").write_bytes(first.path("layer").read_bytes())
    assert other.get("layer") is None
    assert first.get("layer") is not None


def test_what_a_piece_needs_is_not_computed_where_nothing_is_kept(tmp_path: Path) -> None:
    assert Checkpoint(None).needs(before=PIECE) == {}
    assert Checkpoint(tmp_path).needs(before=PIECE) == {"before": PIECE.checksum}


# ---- runs


def test_a_run_is_found_again_with_its_pieces(tmp_path: Path) -> None:
    open_run(tmp_path / "new" / "run", IDENTITY_OF_A_RUN).put("layer", Piece({}, {"error": 1.0}))

    piece = open_run(tmp_path / "new" / "run", dict(reversed(IDENTITY_OF_A_RUN.items()))).get("layer")

    assert piece is not None
    assert piece.facts == {"error": 1.0}


@pytest.mark.parametrize(
    ("identity", "named", "unnamed"),
    [
        ({**IDENTITY_OF_A_RUN, "seed": "1"}, r"\(seed\)", "weights"),
        ({**IDENTITY_OF_A_RUN, "seed": "1", "weights": "0"}, r"\(seed, weights\)", "recipe"),
        ({"weights": "00ff", "seed": "0"}, r"\(recipe\)", "seed"),
        ({**IDENTITY_OF_A_RUN, "placement": "inputs"}, r"\(placement\)", "seed"),
    ],
)
def test_another_runs_folder_is_refused_and_what_differs_is_named(
    tmp_path: Path, identity: dict[str, str], named: str, unnamed: str
) -> None:
    open_run(tmp_path, IDENTITY_OF_A_RUN)

    with pytest.raises(SpecError, match=f"was started with other settings {named}") as raised:
        open_run(tmp_path, identity)

    assert unnamed not in str(raised.value)


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")

    with pytest.raises(SpecError, match=r"is a folder with other files\. Choose a new or an empty one"):
        open_run(tmp_path, IDENTITY_OF_A_RUN)

    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "3", '{"seed": '])
def test_a_folder_whose_identity_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / IDENTITY).write_text(content)

    with pytest.raises(SpecError, match="is a folder with other files"):
        open_run(tmp_path, IDENTITY_OF_A_RUN)


def test_a_file_in_the_place_of_the_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")

    with pytest.raises(OSError, match="run"):
        open_run(tmp_path / "run", IDENTITY_OF_A_RUN)


def test_drafts_that_a_killed_run_left_do_not_matter_and_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / f".calque-{IDENTITY}.{host()}-{dead_process()}-0.draft"
    dead.write_bytes(b"{")

    kept = open_run(tmp_path, IDENTITY_OF_A_RUN).within("fits")
    assert not dead.exists()
    draft = kept.path("layer").with_name(f".calque-layer.{host()}-{dead_process()}-7.draft")
    draft.write_bytes(b"half of a piece")

    again = open_run(tmp_path, IDENTITY_OF_A_RUN)
    assert again.within("fits").get("layer") is None
    with alone(again):
        assert not draft.exists()
        kept.put("layer", Piece({}, {"error": 2.0}))
    piece = kept.get("layer")
    assert piece is not None
    assert piece.facts == {"error": 2.0}


# ---- fingerprints


def test_a_fingerprint_sees_values_names_shapes_and_types_but_not_order_or_strides() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    same = fingerprint({"a": x, "b": torch.zeros(0)})

    assert fingerprint({"b": torch.zeros(0), "a": x.T.contiguous().T}) == same
    others = [
        fingerprint({"a": x}),
        fingerprint({"c": x, "b": torch.zeros(0)}),
        fingerprint({"a": x.reshape(3, 2), "b": torch.zeros(0)}),
        fingerprint({"a": x.double(), "b": torch.zeros(0)}),
        fingerprint({"a": x + torch.eye(2, 3) * 1e-6, "b": torch.zeros(0)}),
        fingerprint({"a": torch.zeros(0), "b": x}),
    ]
    assert same not in others
    assert len(set(others)) == len(others)


def test_a_relative_run_stays_where_it_is_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    kept = open_run("run", IDENTITY_OF_A_RUN)

    monkeypatch.chdir(tmp_path / "elsewhere")
    kept.put("piece", Piece({"codes": torch.ones(2)}, {}))

    monkeypatch.chdir(tmp_path)
    found = open_run("run", IDENTITY_OF_A_RUN).get("piece")
    assert found is not None
