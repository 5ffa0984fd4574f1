"""Files of tensors that a command line names: NumPy's, safetensors and torch.save's, read without running code from them."""

import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from calque.cli.inputs import InputError, shortened
from calque.errors import SpecError
from calque.run.files import require_file

STATE = (
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
)  # the last parts of names in a state dict
LONGEST_REASON = 200  # characters of what a library says of a file
ENCRYPTED = 1  # the flag of a zip archive's member


def load_calibration(path: Path) -> object:
    """The inputs in an .npy, .npz, .safetensors or .pt file: a tensor, or tensors by argument name.

    float64 arrays, NumPy's default, become float32.

    Raises:
        InputError: another kind of file, one that does not hold arrays, or one that holds weights.
        OSError: no regular file.
    """
    readers = {
        ".npy": _numpy,
        ".npz": _numpy,
        ".safetensors": read_safetensors,
        ".pt": read_pickled,
        ".pth": read_pickled,
    }
    if path.suffix not in readers:
        raise InputError(f"a calibration file ends with {', '.join(readers)}. Got {path}.")
    found = readers[path.suffix](path)
    names = _weight_names(found)
    if names:
        raise InputError(
            f"{path} holds weights, not inputs: {shortened(names)}. Pass it with --weights, and inputs with --calibration."
        )
    if not _has_tensors(found):
        raise InputError(
            f"{path} holds no tensors ({type(found).__name__}): calibration needs a tensor, or tensors by argument."
        )
    return torch.utils._pytree.tree_map(_single, found)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises: InputError, OSError."""
    require_file(path)
    with _damage(path, "is not a safetensors file, or is damaged"):
        return safetensors.torch.load_file(path)


def read_pickled(path: Path) -> object:
    """What torch.save wrote, tensors alone; loading runs no code. Raises: InputError, OSError."""
    require_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none of torch's makes torch.load raise
        if isinstance(error, OSError) and error.filename is not None:
            raise
        kind = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if kind:
            held = f"a Python object ({kind[1]}), as torch.save(model) writes it"
        elif "TorchScript" in str(error):
            held = "a TorchScript program"
        else:
            raise InputError(f"{path} is not a file of torch.save, or is damaged.") from error
        raise InputError(
            f"{path} holds {held}; calque loads tensors alone, which run no code. Save model.state_dict(), or a tensor for "
            "--calibration."
        ) from error


def _numpy(path: Path) -> object:
    with require_file(path).open("rb") as file, _damage(path, "does not hold plain NumPy arrays"):
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _array(file, path.stat().st_size)
        with zipfile.ZipFile(file) as archive:
            found = {}
            for entry in archive.infolist():
                if entry.flag_bits & ENCRYPTED:
                    raise SpecError(f"{entry.filename} in it is encrypted.")
                with archive.open(entry) as member:
                    found[entry.filename.removesuffix(".npy")] = _array(member, entry.file_size)
            return found


def _array(file: IO[bytes], size: int) -> Tensor:
    """The array in an .npy file of so many bytes, whose header is believed only as far as these go.

    Raises:
        SpecError: objects, structures, or more values than the file has.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, kind = np.lib.format.read_array_header_2_0(file)
    if kind.hasobject or kind.names is not None:
        raise SpecError(f"its dtype is {kind}; it must be numbers.")
    if any(length < 0 for length in shape):
        raise SpecError(f"its header claims the shape {_shape(shape)}.")
    claimed = math.prod(shape) * kind.itemsize
    header = file.tell()
    if claimed > size - header:
        raise SpecError(f"its header claims the shape {_shape(shape)}, and {size - header:,} bytes follow.")
    file.seek(0)
    loaded: object = np.lib.format.read_array(file, allow_pickle=False)
    assert isinstance(loaded, np.ndarray)
    native = loaded.astype(loaded.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native)


def _shape(shape: tuple[int, ...]) -> str:
    text = str(shape)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


@contextmanager
def _damage(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a library raises on a file into one error that names it; an error of the system stays."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = (
            "it takes more memory than there is" if isinstance(error, MemoryError) else " ".join(str(error).split())
        )
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        raise InputError(f"{path} {what}: {reason.rstrip('.') or type(error).__name__}.") from error


def _weight_names(found: object) -> list[str]:
    """The names in a state dict, or in a checkpoint that has one; none where something else was found."""
    if not isinstance(found, Mapping) or not found:
        return []
    names = [str(name) for name in found]
    ends = [name.rpartition(".")[1:] for name in names]
    if all(last in STATE for _, last in ends) or any(
        dot and last in STATE for dot, last in ends
    ):  # no argument has a dot
        return names
    return next((inside for value in found.values() if (inside := _weight_names(value))), [])


def _has_tensors(found: object) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(found))


def _single(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value
