"""What the front door takes: float networks as Python modules, quantized ones, files; for all else, what to pass in its place."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedParameter

from calque.errors import CalibrationError, CaptureError, SpecError
from calque.network import Batch
from calque.network.copies import private_copy
from calque.network.rewrites.functional import silent_tracing
from calque.network.trace import require_float32
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.run.fields import shown
from calque.run.files import path_of, require_regular

# Where torch's own quantized, quantizing and observing modules live; the float ones among them.
_QUANTIZED = (
    "torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat", "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized", "torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer",
)  # fmt: skip
_FLOAT = ("FloatFunctional", "FXFloatFunctional")
# Wrappers by name, in which the network is an attribute: that of torch.compile, and those for several devices.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}  # fmt: skip

LONGEST_SHOWN = 300  # characters of a path in a message


def require_original(model: object) -> None:
    """Raises CaptureError where `model` is no float network in Python, or a module in it is none; says what to pass instead."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model must be a torch.nn.Module. {_instead(model)}")
    problem = next(_problems(model), None)
    if problem is not None:
        raise CaptureError(problem)


def require_quantized(q: object, call: str) -> None:
    """Raises SpecError where `q` is no quantized network; says what to pass instead.

    Args:
        call: how it is written, such as "export_onnx(q, path)".
    """
    if isinstance(q, QuantizedModel):
        return
    received = f"{type(q).__name__}."
    if isinstance(q, (str, os.PathLike)):
        received = f"the path {os.fspath(q)!r:.{LONGEST_SHOWN}}: are the arguments swapped?"
    elif isinstance(q, nn.Module):
        received = f"the float network {type(q).__name__}: quantize it first."
    raise SpecError(f"{call} takes as q what calque.quantize or calque.load returned. Got {received}")


def file_to_write(path: object, call: str) -> Path:
    """The path, where a file can be written there.

    Raises:
        SpecError: no path.
        OSError: a folder, a pipe or a device; or one in a folder that does not exist.
    """
    found = require_path(path, call)
    if found.is_dir():
        raise IsADirectoryError(f"{found} is a folder. Add the name of the file to write.")
    if not found.parent.is_dir():
        raise FileNotFoundError(f"the folder {found.parent} does not exist. Make it first.")
    require_regular(found)
    return found


def file_to_read(path: object, call: str) -> Path:
    """The path, where a file is.

    Raises:
        SpecError: no path.
        OSError: a folder, or nothing.
    """
    found = require_path(path, call)
    if found.is_dir():
        raise IsADirectoryError(f"{found} is a folder. Pass the file in it.")
    if not found.is_file():
        raise FileNotFoundError(f"there is no file {found}.")
    return found


def require_path(path: object, call: str) -> Path:
    """The path. Raises: SpecError, where it is none; says whether arguments are swapped."""
    if isinstance(path, nn.Module):
        raise SpecError(f"{call} takes as path a str or Path. Got {type(path).__name__}: are the arguments swapped?")
    return path_of(path, call)


def require_inputs(model: object, calibration: object) -> None:
    """Raises SpecError where the two are swapped; CalibrationError where `calibration` is a network, or a file's name."""
    if isinstance(calibration, nn.Module):
        if not isinstance(model, nn.Module):
            raise SpecError(
                f"model and calibration are swapped: the network comes first. Got {type(model).__name__} and "
                f"{type(calibration).__name__}; call quantize(model, calibration)."
            )
        raise CalibrationError(f"calibration is inputs of the network. Got the module {type(calibration).__name__}.")
    if isinstance(calibration, (str, os.PathLike)):
        raise CalibrationError(
            "calibration is the inputs themselves, not a file's name. "
            f"Got {os.fspath(calibration)!r:.{LONGEST_SHOWN}}; load it first: "
            "torch.load(path), or torch.from_numpy(numpy.load(path))."
        )


def require_call(model: nn.Module, batch: Batch) -> None:
    """Raises CalibrationError where the model itself fails on the inputs; CaptureError where its own types are to blame."""
    try:
        _call(model, batch)
    except CaptureError:  # it cannot be copied
        raise
    except Exception as error:  # whatever its forward raises
        require_float32(model)
        raise CalibrationError(
            f"the model itself fails on the calibration inputs: {type(error).__name__}: {str(error).strip()}"
            f"{_converted(model, batch)}"
        ) from error


def _call(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad(), silent_tracing():
        private_copy(model)(**batch)


def _converted(model: nn.Module, batch: Batch) -> str:
    """How to convert the inputs, where the model runs on them then."""
    for dtype, how in ((torch.float32, ".float()"), (torch.int64, ".long()")):
        other = [name for name, value in batch.items() if isinstance(value, Tensor) and value.dtype != dtype]
        for names in ([name] for name in other) if len(other) == 1 else (*([name] for name in other), other):
            changed = {name: value.to(dtype) if name in names else value for name, value in _tensors(batch).items()}
            try:
                _call(model, {**batch, **changed})
            except Exception:
                continue
            return f". It runs on {', '.join(f'{name}{how}' for name in names)}: convert the inputs."
    return ""


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def _instead(value: object) -> str:
    """What was received, and what to pass in its place."""
    received = f"Got {type(value).__name__}"
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"Got the class {value.__name__}; pass an instance with its weights loaded."
    if isinstance(value, ExportedProgram):
        return f"{received}; pass the module that was exported, or .module() of the program."
    if isinstance(value, Mapping) and value and all(isinstance(each, Tensor) for each in value.values()):
        return f"{received} of tensors; build the network, load them (model.load_state_dict) and pass the network."
    if isinstance(value, Mapping):
        states = [key for key, entry in value.items() if isinstance(entry, Mapping)]
        known = next((key for key in states if "state" in str(key) or "model" in str(key)), None)
        if known is not None:
            return f"{received} with an entry {shown(known)}; build the network, load it (model.load_state_dict) and pass that."
    if isinstance(value, (str, os.PathLike)):
        return f"{received}, a file's name; build the network, load its weights (model.load_state_dict) and pass the network."
    if isinstance(value, Tensor):
        return f"{received}; the network comes first and its inputs second: quantize(model, calibration)."
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, nn.Module) for each in value):
        return f"{received} of modules; pass one module, such as torch.nn.Sequential(*modules)."
    if isinstance(value, torch.jit.ScriptFunction):
        return f"{received}, which was compiled by torch.jit; pass the Python module that it was made from."
    if callable(value):
        return f"{received}; pass the module that it calls, or a module whose forward calls it."
    return f"{received}; pass the float network."


def _problems(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        what = f"module {path}" if path else "the network"
        kind, home = type(module).__name__, type(module).__module__
        inside = _WRAPPERS.get(kind) if home.startswith("torch.") else None
        if isinstance(module, torch.jit.ScriptModule):
            yield (
                f"{what} ({getattr(module, 'original_name', kind)}) was compiled by torch.jit.script or torch.jit.trace: "
                "scripted modules cannot be captured. Pass the original Python module, with the same weights."
            )
        elif inside is not None:
            found = f'model.get_submodule("{path}").{inside}'
            put = (
                f'Put its .{inside} in its place: model.set_submodule("{path}", {found})'
                if path
                else f"Pass model.{inside}"
            )
            yield f"{what} is wrapped in {kind}, which is no part of the network. {put}."
        elif isinstance(module, (QuantizedModel, QuantizedLayer, Quantizer)):
            yield f"{what} ({kind}) is quantized by calque already. Pass the float network that it was made from."
        elif home.startswith(_QUANTIZED) and kind not in _FLOAT:
            yield (
                f"{what} ({home}.{kind}) is quantized, or prepared for it, by torch.ao already. Pass the float network "
                "from before that."
            )
        yield from _odd_parameters(what, module)


def _odd_parameters(what: str, module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta and not isinstance(parameter, UninitializedParameter):
            yield (
                f"{name} of {what} is on the device meta, where it has no values. Make the network on another device, or move it "
                'with to_empty(device="cpu") and load its weights.'
            )
        if isinstance(parameter, UninitializedParameter):
            yield f"{name} of {what} has no shape yet. Call the network once with an input, then pass it."
        elif type(parameter) not in (nn.Parameter, Tensor) and type(parameter.data) is not Tensor:
            yield (
                f"{name} of {what} is a {type(parameter).__name__}, no plain tensor: it is quantized or distributed already. "
                "Pass the float network from before that."
            )
