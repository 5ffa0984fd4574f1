"""Optional packages: imported when they are needed, and one sentence where that fails."""

import importlib
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

from calque.errors import MissingExtraError


@dataclass(frozen=True, slots=True)
class Extra:
    """A package that calque does without until something needs it.

    Attributes:
        package, module: what is installed, what is imported.
        purpose: what needs it.
    """

    package: str
    module: str
    purpose: str


# By the names that `pip install 'calque[name]'` takes; pyproject.toml has the versions.
EXTRAS = MappingProxyType({
    "demo": Extra("scikit-learn", "sklearn", "calque demo (its digits)"),
    "plot": Extra("matplotlib", "matplotlib", "calque plan (the picture of the curve)"),
    "openvino": Extra("openvino", "openvino", "verify in OpenVINO"),
    "qonnx": Extra("qonnx", "qonnx", "verify in QONNX's executor"),
    "ray": Extra("ray", "ray", "workers on several machines"),
})  # fmt: skip


def pip_line(name: str) -> str:
    """What installs an extra.

    >>> pip_line("plot")
    "pip install 'calque[plot]'"
    """
    return f"pip install 'calque[{name}]'"


def import_extra(name: str, module: str | None = None) -> ModuleType:
    """The module of an extra, imported now.

    Args:
        name: of the extra.
        module: inside of its package; the package itself by default.

    Raises:
        MissingExtraError: the package is not installed, or is and cannot be imported.
    """
    extra = EXTRAS[name]
    try:
        found = importlib.import_module(extra.module)
        return found if module is None else importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == extra.module
        if absent:
            raise MissingExtraError(f"{extra.package} is not installed: {pip_line(name)}.") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MissingExtraError(
            f"{extra.package} is installed, but cannot be imported: {reason}. Install it again: {pip_line(name)}."
        ) from error
