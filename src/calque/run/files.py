"""Files and folders that no kill and no full disk leaves half-made, and that name who left them where one does."""

import errno
import itertools
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calque.errors import SpecError
from calque.run.fields import shown
from calque.run.processes import host, is_alive

FilePath = str | os.PathLike[str]

LONGEST_PATH = 4095  # bytes, on Linux
DAY = 24 * 3600.0  # seconds: after so long nobody on another machine writes at a draft any more
PREFIX = "calque-"
NAME = 40  # characters of a file's name that its draft repeats
_OWNER = r"([0-9a-f]{8})-(\d+)-\d+"
_DRAFT = re.compile(rf"\.{PREFIX}.*\.{_OWNER}\.draft", re.DOTALL)
_FOLDER = re.compile(rf"{PREFIX}{_OWNER}-.*", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip
_count = itertools.count()


def path_of(path: object, what: str) -> Path:
    """The path.

    Args:
        what: takes it, such as "load(path, model)".

    Raises:
        SpecError: none, or one that no file can have.
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise SpecError(f"{what} takes as path a str or Path. Got {type(path).__name__}.")
    problem = "a NUL in it" if "\0" in name else f"{len(name):,} characters" if len(name) > LONGEST_PATH else ""
    if problem:
        raise SpecError(f"{what} takes as path one that a file can have. Got {shown(name)}, which has {problem}.")
    return Path(name)


def require_file(path: FilePath) -> Path:
    """The path of a regular file, to be read: links followed.

    Raises:
        OSError: nothing there; or what no reader would come to an end with, such as a directory, a pipe or a device.
        SpecError: no path.
    """
    found = path_of(path, "reading a file")
    kind = stat.S_IFMT(found.stat().st_mode)
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(number, f"is {_KINDS.get(kind, 'no regular file')}; a file is needed", str(path))
    return found


def write_whole(path: FilePath, content: bytes) -> None:
    """Writes a file that is never seen half-written: under another name first, then renamed.

    Where it cannot be written, the file that was there stays, and no draft of the new one. What a dead process has left in
    the folder is removed. A symbolic link stays one: the file that it points to is replaced. The content is on the disk
    before it gets its name, so that a loss of power leaves the old or the new file, and so that file systems which find out
    late that they are full say so in time.

    Raises:
        OSError: the path is no regular file, or cannot be written; it is named.
    """
    target = require_regular(path)
    sweep_drafts(target.parent)
    replace_file(target, content, durable=True)


def replace_file(target: Path, content: bytes, *, durable: bool) -> None:
    """`write_whole` of a regular file, without a look at what else is in the folder.

    Args:
        durable: whether the content must outlast a loss of power; a piece of a run need not, as it can be made again.
    """
    draft = target.with_name(f".{PREFIX}{target.name[:NAME]}.{_owner()}.draft")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        with suppress(OSError):
            os.chmod(draft, stat.S_IMODE(target.stat().st_mode))  # a file that was private stays so
        os.replace(draft, target)
    except OSError as error:
        raise cannot_write(error, target) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def cannot_write(error: OSError, path: FilePath, advice: str = "") -> OSError:
    """The error with the path that the user knows, in place of a draft's or none."""
    reason = error.strerror or str(error) or type(error).__name__
    return OSError(error.errno, f"cannot be written: {reason}{advice}", str(path))


def require_regular(path: FilePath) -> Path:
    """Where a file at `path` would be: links followed.

    Raises:
        OSError: something is there that is no regular file, such as a directory, a pipe or a device.
    """
    target = Path(path)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    try:
        kind = stat.S_IFMT(target.stat().st_mode)
    except FileNotFoundError:
        return target
    except OSError as error:
        raise cannot_write(error, path) from error
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(number, f"is {_KINDS.get(kind, 'no regular file')}, which no file can replace", str(path))
    return target


def sweep_drafts(folder: FilePath) -> None:
    """Removes what processes that are dead have left half-written or half-deleted in a folder."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            match = _DRAFT.fullmatch(entry.name)
            if match is not None and _is_left(match, entry):
                _remove(Path(entry.path))


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for files that must have a name; a kill leaves it to the next run, which sees in its name that it is no one's."""
    sweep_folders()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_owner()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_folders() -> None:
    """Removes temporary folders of processes that are dead."""
    with suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            match = _FOLDER.fullmatch(entry.name)
            if match is not None and _is_left(match, entry):
                _remove(Path(entry.path))


def remove_folder(folder: Path) -> None:
    """Deletes a folder, if it is there, whose files are of use together: a kill leaves all of them in it or none."""
    draft = folder.with_name(f".{PREFIX}{folder.name[:NAME]}.{_owner()}.draft")
    try:
        os.replace(folder, draft)
    except OSError:  # it is not there; or, on Windows, somebody looks into it
        draft = folder
    shutil.rmtree(draft, ignore_errors=True)


def _is_left(match: re.Match[str], entry: os.DirEntry[str]) -> bool:
    """Whether the owner is dead: certain on its own machine, on another one after a day without a change."""
    if match[1] == host():
        return not is_alive(int(match[2]))
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > DAY
    except OSError:  # it is gone already
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _owner() -> str:
    """What tells this process, and each of its drafts, from all others."""
    return f"{host()}-{os.getpid()}-{next(_count)}"
