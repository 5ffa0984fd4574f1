"""What an import brings: `import calque` almost nothing, each command and name what it needs."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import calque
from calque.grid.bits import SHIPPED
from calque.recipe import RECIPES

HEAVY = {
    "joblib", "matplotlib", "numpy", "onnx", "onnxruntime", "onnxscript", "scipy", "sklearn", "sympy", "torch",
}  # fmt: skip
MOST_MODULES = 150  # of Python's own library and of calque that `import calque` loads: 60 with Python 3.11


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """The modules that a new process has loaded after this code, those that Python starts with left out."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint()\nprint(*sorted(set(sys.modules) - before))"
    done = run(script)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_import_calque_brings_no_other_package() -> None:
    loaded = loaded_by("import calque; assert calque.__version__; dir(calque)")

    assert not packages(loaded) & HEAVY
    assert len(loaded) <= MOST_MODULES
    assert {name for name in loaded if name.startswith("calque.")} == {"calque.errors"}


def test_quantize_without_a_budget_or_workers_brings_neither_onnx_nor_scipy_nor_joblib() -> None:
    loaded = loaded_by(
        "import calque, torch\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()\n"
        "calque.quantize(net, torch.randn(8, 4), recipe='nearest')"
    )

    assert packages(loaded) & HEAVY == {"numpy", "sympy", "torch"}  # torch.export brings sympy


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["--wrong"], ["misspelt"], ["quantize", "--help"], ["verify", "--wrong"], ["plan"]],
    ids=" ".join,
)
def test_help_and_misspelt_commands_do_not_wait_for_torch(arguments: list[str]) -> None:
    loaded = loaded_by(f"from calque.cli import run; run({arguments})")

    assert not packages(loaded) & HEAVY


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("calque qu", ["quantize"]),
        ("calque recipe ", list(SHIPPED)),
        ("calque quantize --recipe a", ["accurate", "advanced"]),
        ("calque verify --target ", ["onnxruntime", "openvino", "qonnx"]),
    ],
)
def test_the_shell_is_offered_words_without_waiting_for_torch(words: str, offered: list[str]) -> None:
    asked = {"_CALQUE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    script = """
import atexit, sys
atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr))
sys.argv = ["calque"]
from calque.cli import main
main()
"""
    done = run(script, **asked)

    assert done.stdout.split() == offered
    assert "calque" in done.stderr.split()
    assert not set(done.stderr.split()) & HEAVY


def test_every_public_name_is_there_listed_and_imported_once() -> None:
    for name in calque.__all__:
        assert name in dir(calque)
        assert getattr(calque, name) is getattr(calque, name)
    listed: dict[str, object] = {}
    exec("from calque import *", listed)
    assert set(calque.__all__) <= set(listed)


def test_a_type_checker_sees_the_names_that_python_finds() -> None:
    """Those under TYPE_CHECKING are written twice, and must stay the same."""
    (block,) = (
        node for node in ast.parse(Path(calque.__file__).read_text(encoding="utf-8")).body if isinstance(node, ast.If)
    )
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}

    assert seen | {"errors"} == set(calque.__all__)


def test_rooms_are_attributes_and_other_names_are_not() -> None:
    assert run("import calque; calque.recipe.FAST").returncode == 0
    with pytest.raises(AttributeError, match="module 'calque' has no attribute 'quantise'"):
        calque.quantise  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(calque, "__wrapped__")


def test_a_package_that_a_room_misses_is_named_and_no_attribute_error() -> None:
    done = run("import sys; sys.modules['onnx'] = None\nimport calque\ncalque.export_onnx")

    assert "ModuleNotFoundError" in done.stderr
    assert "onnx" in done.stderr.splitlines()[-1]


def test_threads_that_ask_for_names_at_once_all_get_them() -> None:
    script = """
import threading, calque, json
found, go = [], threading.Barrier(len(calque.__all__))
def ask(name):
    go.wait()
    found.append(getattr(calque, name) is not None)
threads = [threading.Thread(target=ask, args=(name,)) for name in calque.__all__]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found == [True] * len(calque.__all__)))
"""
    done = run(script)

    assert done.stderr == ""
    assert json.loads(done.stdout)


@pytest.mark.slow  # two processes
def test_names_that_are_first_asked_for_under_modes_of_torch_compute_the_same() -> None:
    """Modules are imported where a name is first asked for: nothing that they hold may depend on that place."""
    quantizing = """
import calque, torch
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
with torch.no_grad():
    for seed, parameter in enumerate(net.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
x = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))
q = calque.quantize(net, x, bits="w3a4")
print(*(value.double().sum().item() for value in q.state_dict().values()), *q(x).flatten().tolist())
"""
    asking = """
import calque, torch
from torch._subclasses.fake_tensor import FakeTensorMode
torch.set_default_dtype(torch.float64)
with torch.device("meta"), FakeTensorMode(), torch.inference_mode():
    for name in calque.__all__:
        getattr(calque, name)
torch.set_default_dtype(torch.float32)
"""
    plain, under_modes = run(quantizing), run(asking + quantizing)

    assert (plain.returncode, under_modes.returncode) == (0, 0), under_modes.stderr
    assert under_modes.stdout == plain.stdout


def test_what_was_made_of_public_classes_is_unpickled_where_calque_was_not_imported() -> None:
    packed = pickle.dumps(calque.Budget(size=0.5)).hex()

    read = run("import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).size)", packed)

    assert read.stdout.strip() == "0.5"


def test_the_command_line_knows_the_shipped_recipes() -> None:
    assert tuple(RECIPES) == SHIPPED
