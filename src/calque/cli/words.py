"""Arguments and options that several commands share.

The modules that declare commands import what their declarations need; each command imports the rest when it is called. So
`calque --help`, a misspelt option and the shell's completion do not wait for torch.
"""

from pathlib import Path
from typing import Annotated

import typer

from calque.grid.bits import SHIPPED

ENTRY = "calque"
TARGETS = ("onnxruntime", "openvino", "qonnx")

Folder = Annotated[Path, typer.Argument(help="the folder of a run", metavar="RUN")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]
Seed = Annotated[
    int,
    typer.Option(help="of everything random; the same seed gives the same codes, but for recipes bounded in minutes"),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="import the function that run.json names, although others could have written its name"
    ),
]
Runtime = Annotated[
    str, typer.Option("--target", help="onnxruntime, openvino or qonnx", autocompletion=lambda: list(TARGETS))
]


def recipes() -> list[str]:
    """What the shell offers where a recipe is asked for."""
    return list(SHIPPED)
