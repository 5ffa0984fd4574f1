"""Files that are whole or not there, and what dead processes have left."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_processes import dead_process
from torch import nn

import calque
import networks
from calque.grid.bits import Bits, Plan
from calque.run.files import DAY, remove_folder, sweep_drafts, sweep_folders, temporary_folder, write_whole
from calque.run.processes import host
from calque.run.spill import Store

posix = pytest.mark.skipif(sys.platform == "win32", reason="of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_written_file_has_the_content_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"first", b"", b"second"):
        write_whole(tmp_path / "plan.toml", content)

        assert (tmp_path / "plan.toml").read_bytes() == content
        assert names(tmp_path) == ["plan.toml"]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_whole(tmp_path / name, b"content")

        assert (tmp_path / name).read_bytes() == b"content"


@posix
def test_a_file_keeps_who_may_read_it_and_a_new_one_follows_the_umask(tmp_path: Path) -> None:
    private, new = tmp_path / "private", tmp_path / "new"
    private.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        write_whole(private, b"content")
        write_whole(new, b"content")
    finally:
        os.umask(before)

    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


@posix
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "file").write_bytes(b"old")
    for name, target in (("link", inner / "file"), ("dangling", inner / "new")):
        (tmp_path / name).symlink_to(target)

        write_whole(tmp_path / name, b"content")

        assert (tmp_path / name).is_symlink()
        assert target.read_bytes() == b"content"


@posix
@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "link to a directory", "loop"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    else:
        path.symlink_to(tmp_path if kind == "link to a directory" else path)
    before = names(tmp_path)

    with pytest.raises(OSError, match="symbolic links" if kind == "loop" else "which no file can replace") as raised:
        write_whole(path, b"content")

    assert raised.value.filename == str(path)
    assert names(tmp_path) == before


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no such folder" / "plan.toml"

    with pytest.raises(FileNotFoundError, match="cannot be written: No such file or directory") as raised:
        Plan({"conv": Bits(4, 4)}).save(path)

    assert raised.value.filename == str(path)


# ---- full disks: the kernel refuses to let files grow as it would on a disk that is full

LIMITED = """
import resource, sys
from pathlib import Path
import torch
import calque, networks
from calque.run.files import write_whole
from calque.grid.bits import Bits, Plan
from calque.run.spill import Store

q = calque.quantize(networks.seeded(networks.Residual()), networks.images(8, seed=0), bits="w4a4", recipe="nearest")
folder = Path(sys.argv[1])
writers = {
    "q.safetensors": lambda path: calque.save(q, path),
    "m.onnx": lambda path: calque.export_onnx(q, path),
    "p.toml": lambda path: Plan({f"layer{index}": Bits(4, 4) for index in range(200)}).save(path),
    "report.txt": lambda path: write_whole(path, b"x" * 5000),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
for name, write in writers.items():
    try:
        write(folder / name)
    except OSError as error:
        print(f"{error.filename}|{error.strerror}|{error.errno}")
try:
    with Store(0) as store:
        store.put(torch.zeros(100_000))
except OSError as error:
    print(f"{error.filename}|{error.strerror}|{error.errno}")
"""


@posix
@pytest.mark.slow  # another process imports everything
def test_on_a_full_disk_the_old_file_stays_and_the_error_names_it(tmp_path: Path) -> None:
    files = ["q.safetensors", "m.onnx", "p.toml", "report.txt"]
    for name in files:
        (tmp_path / name).write_bytes(b"old")
    paths = os.pathsep.join([str(Path(calque.__file__).parents[1]), str(Path(networks.__file__).parent)])

    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip

    lines = [line.split("|") for line in found.stdout.splitlines()]
    assert [line[0] for line in lines] == [*(str(tmp_path / name) for name in files), tempfile.gettempdir()]
    assert all(line[1].startswith("cannot be written: File too large") for line in lines)
    assert all(line[2] == str(errno.EFBIG) for line in lines)
    assert "set TMPDIR" in lines[-1][1]
    assert names(tmp_path) == sorted(files)
    assert all((tmp_path / name).read_bytes() == b"old" for name in files)


# ---- what the dead have left


def draft(folder: Path, host: str, process: int, *, age: float = 0.0) -> Path:
    path = folder / f".calque-q.safetensors.{host}-{process}-0.draft"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    gone = draft(tmp_path, host(), dead_process())
    elsewhere = draft(tmp_path, "00000000", 1)
    forgotten = draft(tmp_path, "00000001", 1, age=2 * DAY)
    alive = draft(tmp_path, host(), os.getpid(), age=2 * DAY)
    others = tmp_path / ".calque-notes.draft"
    others.touch()

    write_whole(tmp_path / "p.toml", b"")

    assert names(tmp_path) == sorted([elsewhere.name, alive.name, others.name, "p.toml"])
    assert not gone.exists()
    assert not forgotten.exists()


def test_a_folder_is_removed_at_once_and_what_a_kill_leaves_of_it_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = tmp_path / "pieces"
    (pieces / "fits").mkdir(parents=True)
    (pieces / "fits" / "a.safetensors").touch()
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed behind the first step
        remove_folder(pieces)
    (left,) = tmp_path.iterdir()
    assert not pieces.exists()
    left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead_process()}-")))

    sweep_drafts(tmp_path)

    assert not names(tmp_path)
    remove_folder(pieces)  # that is not there


def test_temporary_folders_end_with_their_use_and_those_of_the_dead_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"calque-{host()}-{dead_process()}-0-abc"
    left.mkdir()
    (left / "problem").touch()
    (tmp_path / "calque-notes").mkdir()

    with temporary_folder() as folder:
        assert not left.exists()
        assert folder.parent == tmp_path
        sweep_folders()
        assert folder.is_dir()  # its owner lives

    assert names(tmp_path) == ["calque-notes"]


# ---- values past the memory budget


@posix
def test_values_on_disk_have_no_name_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with Store(0) as store:
        kept = [store.put(torch.full((50_000,), float(index))) for index in range(3)]

        assert not names(tmp_path)
        assert [store.get(each)[-1].item() for each in kept] == [0.0, 1.0, 2.0]


def test_a_store_gives_back_what_it_was_given_in_whatever_order_it_is_dropped() -> None:
    chance = torch.Generator().manual_seed(0)
    alive: list[tuple[object, torch.Tensor]] = []
    with Store(0) as store:
        for step in range(200):
            size = int(torch.randint(17_000, 60_000, (1,), generator=chance))
            value = torch.full((size,), float(step))
            alive.append((store.put(value), value))
            if len(alive) > 6:
                kept, _ = alive.pop(int(torch.randint(len(alive), (1,), generator=chance)))
                store.drop(kept)
            assert all(torch.equal(store.get(kept), value) for kept, value in alive)
        for kept, _ in alive:
            store.drop(kept)

        spill = store._spill
        assert spill is not None
        assert os.fstat(spill._file.fileno()).st_size == 0  # gaps at the end are given back


def test_gaps_are_filled_before_the_file_grows() -> None:
    with Store(0) as store:
        kept = [store.put(torch.zeros(50_000)) for _ in range(5)]
        spill = store._spill
        assert spill is not None
        size = os.fstat(spill._file.fileno()).st_size
        for each in kept[:4]:
            store.drop(each)
        again = [store.put(torch.ones(50_000)) for _ in range(4)]

        assert os.fstat(spill._file.fileno()).st_size == size
        assert all(bool((store.get(each) == 1).all()) for each in again)
        assert bool((store.get(kept[4]) == 0).all())


def test_values_without_a_numpy_type_go_to_disk_too() -> None:
    value = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    with Store(0) as store:
        assert torch.equal(store.get(store.put(value)), value)


def test_an_export_refuses_what_is_no_regular_file_before_it_starts(tmp_path: Path) -> None:
    q = calque.quantize(nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4), recipe="nearest")

    for write in (calque.export_onnx, calque.save):
        with pytest.raises(OSError, match="is a folder"):
            write(q, tmp_path)
