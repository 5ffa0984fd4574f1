"""Command lines that must fail with one line: a case is what is typed, and what the line must name."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import calque.cli

from . import bad_files
from .bad_files import arrays, broken, headers, json_texts, pt, shortened, special, tensors, toml_texts, whole_files
from .bad_words import MODELS, MODULE, WRONG

Words = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Command:
    """A command line.

    Attributes:
        given: what is wrong in it.
        named: one of these must be in the error.
        prepare: makes the files that only this case has.
    """

    given: str
    arguments: tuple[str, ...]
    named: tuple[str, ...]
    prepare: Callable[[], object] = lambda: None


def ground(folder: Path) -> None:
    """Puts into the current folder what the commands read: a module, inputs, a finished run and its ONNX file."""
    (folder / "subject.py").write_text(MODULE)
    (folder / "broken_module.py").write_text("import nothing_of_that_name\n")
    np.save(folder / "inputs.npy", bad_files.images().numpy())
    (folder / "table.csv").write_text("layer,bits,milliseconds\n0,w8a8,1\n3,w8a8,1\n0,w4a4,0.5\n3,w4a4,0.5\n")
    words = ["quantize", "subject:build", "--calibration", "inputs.npy", "--recipe", "nearest", "--quiet"]
    assert calque.cli.run([*words, "--bits", "w8a8,w4a4", "--size", "2600B", "-o", "run"]) == 0
    assert calque.cli.run(["export", "run", "model.onnx"]) == 0


def quantize(
    *more: str, model: str = "subject:build", calibration: str = "inputs.npy", output: str = "out"
) -> tuple[str, ...]:
    """A command that would succeed, under more options."""
    return ("quantize", model, "--calibration", calibration, "-o", output, "--recipe", "nearest", "--quiet", *more)


def commands(folder: Path) -> Iterator[Command]:
    """All cases, for the current folder, which is `folder` and has its ground."""
    yield from _calibrations(folder)
    yield from _weights(folder)
    yield from _texts(folder)
    yield from _options()
    yield from _outputs(folder)
    yield from _runs(folder)
    yield from _tables(folder)


def _written(folder: Path, contents: Mapping[str, bytes]) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name


def _calibrations(folder: Path) -> Iterator[Command]:
    place = folder / "bad inputs"
    for suffix, good in whole_files().items():
        for path in _written(place, {f"{what}{suffix}": content for what, content in broken(suffix, good)}):
            yield Command(f"calibration {path.name}", quantize(calibration=str(path)), (str(path),))
    for path in _written(place, {**arrays(), **headers()}):
        yield Command(f"calibration {path.name}", quantize(calibration=str(path)), (str(path), "calibration"))
    for what, value in tensors().items():
        (path,) = _written(place, {f"{what}.pt": pt(value)})
        yield Command(f"calibration {path.name}", quantize(calibration=str(path)), (str(path), "calibration"))
    for what, name in special(place, ".npy"):
        yield Command(
            f"calibration {what}", quantize(calibration=name), (shortened(name), "is a directory", "ends with")
        )
    for name in ("inputs.txt", "inputs", "inputs.npy.gz", "table.csv", "run", "."):
        yield Command(f"calibration {name}", quantize(calibration=name), (name,))


def _weights(folder: Path) -> Iterator[Command]:
    place = folder / "bad weights"
    state = _state()
    for suffix in (".pt", ".safetensors"):
        good = pt(state) if suffix == ".pt" else bad_files.safe(state)
        for path in _written(place, {f"{what}{suffix}": content for what, content in broken(suffix, good)}):
            yield Command(f"weights {path.name}", quantize("--weights", str(path)), (str(path),))
    first = next(iter(state))
    for what, value in {
        **tensors(),
        **{f"state {what}": {**state, first: value} for what, value in tensors().items()},
    }.items():
        if what in ("state half", "state bfloat16", "state expanded"):
            continue  # load_state_dict converts types; the last one has a shape of its own below
        (path,) = _written(place, {f"{what}.pt": pt(value)})
        yield Command(f"weights {path.name}", quantize("--weights", str(path)), (str(path), first))
    numbered = {index: value for index, value in enumerate(state.values())}
    mixed: dict[object, Tensor] = dict(state.items())
    mixed[3] = state[first]
    odd: dict[str, object] = {
        "numbered": numbered, "numbers and names": mixed,
        "one missing": {k: v for k, v in state.items() if k != first},
        "one more": {**state, "more": state[first]}, "nested twice": {"a": {"b": state}},
        "two": {"a": state, "b": state}, "list": [state],
        "transposed": {**state, "3.weight": state["3.weight"].T}, **{
            f"{kind} weight": {**state, "3.weight": _converted(state["3.weight"], kind)}
            for kind in ("sparse", "meta", "float8", "complex", "quantized", "nested", "nan", "inf", "int64", "bool", "uint16")
        },
    }  # fmt: skip
    for what, value in odd.items():
        (path,) = _written(place, {f"{what}.pt": pt(value)})
        yield Command(f"weights {what}", quantize("--weights", str(path)), (str(path), "3"))
    for what, name in special(place, ".pt"):
        yield Command(f"weights {what}", quantize("--weights", name), (shortened(name), "is a directory", "ends with"))


def _state() -> dict[str, Tensor]:
    space: dict[str, object] = {}
    exec(MODULE, space)
    build = space["build"]
    assert callable(build)
    return dict(build().state_dict())


def _converted(value: Tensor, kind: str) -> Tensor:
    changes: dict[str, Callable[[], Tensor]] = {
        "sparse": value.to_sparse, "meta": lambda: value.to("meta"), "float8": lambda: value.to(torch.float8_e4m3fn),
        "complex": lambda: value.to(torch.complex64),
        "quantized": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor(list(value)), "nan": lambda: value * torch.nan,
        "inf": lambda: value + torch.inf,
        "int64": lambda: (value * 9).long(), "bool": lambda: value > 0,
        "uint16": lambda: value.abs().mul(9).to(torch.uint16),
    }  # fmt: skip
    return changes[kind]()


def _texts(folder: Path) -> Iterator[Command]:
    for option in ("--plan", "--recipe"):
        place = folder / f"bad {option}"
        line = [word for word in quantize() if option == "--plan" or word not in ("--recipe", "nearest")]
        for path in _written(place, {f"{what}.toml": content for what, content in toml_texts().items()}):
            yield Command(f"{option} {path.name}", (*line, option, str(path)), (str(path), path.name))
        for what, name in special(place, ".toml"):
            yield Command(
                f"{option} {what}", (*line, option, name), (shortened(name) or "is a directory", "recipe is one of")
            )
    for path in _written(folder / "bad --recipe", {f"{what}.toml": content for what, content in toml_texts().items()}):
        yield Command(f"recipe {path.name}", ("recipe", str(path)), (str(path),))


def _options() -> Iterator[Command]:
    for option, texts in WRONG.items():
        # a budget needs several bits
        more: tuple[str, ...] = (
            ("--bits", "w8a8,w4a4")
            if option in ("--size", "--bops", "--activation-memory", "--latency", "--loss")
            else ()
        )
        more += ("--size", "2600B") if option == "--loss" else ()
        for text in texts:
            names = (option[2:], option[2:].replace("-", "_"), *((text,) if len(text) > 2 else ()))
            extra = {
                "--bits": ("bits", "w8a8"),
                "--max-loss": ("loss",),
                "--evaluate": ("package.module:name",),
                "--latency": ("milliseconds", text.rpartition("=")[0]),
            }.get(option, ())
            line = [word for word in quantize() if option != "--recipe" or word not in ("--recipe", "nearest")]
            yield Command(f"{option} {text[:40]!r}", (*line, *more, f"{option}={text}"), (*names, *extra))
    for reference in MODELS:
        yield Command(
            f"model {reference!r}",
            quantize(model=reference),
            (reference or "package.module:name", "network", "layer", "model", "parameters"),
        )
    unfinished: list[tuple[str, ...]] = [
        (word,) for word in ("quantize", "export", "plan", "report", "recipe", "nonsense", "--nonsense")
    ]
    for typed in (*unfinished, ("verify", "model.onnx"), ("latency", "run")):
        yield Command(f"nothing behind {' '.join(typed)}", typed, ("Missing", "No such"))
    odd: list[tuple[str, ...]] = [
        ("export", "run", "x.onnx", "--nonsense"),
        ("report", "run", "--html"),
        ("quantize", "--bits"),
    ]
    for typed in (*odd, quantize("--resume", "--overwrite"), quantize("--seed", "1", "2")):
        yield Command(f"options of no use: {typed[-1]}", typed, ("option", "argument", "--resume", "quires"))
    dual = ("--max-loss", "0.1", "--minimize", "latency", "--bits", "w8a8,w4a4")
    halves: list[tuple[str, ...]] = [
        ("--size", "0.3"),
        ("--bits", "w8a8,w4a4"),
        ("--max-loss", "0.1"),
        ("--minimize", "size"),
        dual,
    ]
    for half in halves:
        yield Command(f"half of two options: {half[0]}", quantize(*half), ("budget", "minimize", "latency"))


def _outputs(folder: Path) -> Iterator[Command]:
    place = folder / "bad outputs"
    place.mkdir(exist_ok=True)
    for what, name in special(place, ""):
        if what in ("missing", "directory", "no name", "home of nobody", "line break", "dangling", "surrogate"):
            continue  # which can be made, or are empty folders
        yield Command(f"quantize -o {what}", quantize(output=name), (shortened(name),))
        yield Command(f"demo -o {what}", ("demo", "-o", name, "--quiet"), (shortened(name),))
    for name in ("subject.py", "/proc/none", "/dev/full", "/sys/none", ".", "run"):
        yield Command(f"quantize -o {name}", quantize(output=name), (name, "folder"))
    for what, name in special(place, ".onnx"):
        if what in ("missing", "line break", "dangling", "surrogate"):
            continue  # which can be written
        named = (shortened(name) or ".", "folder")
        yield Command(f"export to {what}", ("export", "run", name), named)
        yield Command(f"latency to {what}", ("latency", "run", "-o", name, "--quiet"), named)
    for name in ("nowhere/x.onnx", "/proc/none/x.onnx", "/dev/full", "/dev/null", "subject.py/x.onnx", ".", "/", "run"):
        yield Command(f"export to {name}", ("export", "run", name), (name, str(Path(name).parent)))


def _runs(folder: Path) -> Iterator[Command]:
    for command in (
        ("report", "{}"),
        ("plan", "{}"),
        ("export", "{}", "x.onnx"),
        ("verify", "model.onnx", "{}"),
        ("latency", "{}", "-o", "x.csv"),
    ):
        for what, name in [
            *special(folder / "bad outputs", ""),
            ("nowhere", "nowhere"),
            ("a file", "subject.py"),
            ("another folder", "."),
        ]:
            if what == "no name":
                continue  # the current folder, as before
            yield Command(
                f"{command[0]} of {what}",
                tuple(word.format(name) if word == "{}" else word for word in command),
                (shortened(name),),
            )
    readers = {
        "run.json": ("report", "export", "verify", "latency"),
        "report.json": ("report",),
        "prices.json": ("plan",),
        "q.safetensors": ("export", "verify"),
    }
    lines = {"report": ("report", "bad run"), "export": ("export", "bad run", "x.onnx"),
        "verify": ("verify", "model.onnx", "bad run"),
             "plan": ("plan", "bad run"), "latency": ("latency", "bad run", "-o", "x.csv")}  # fmt: skip
    for name, known in readers.items():
        good = (folder / "run" / name).read_bytes()
        damaged = json_texts(good) if name.endswith(".json") else dict(broken(".safetensors", good))
        for index, (what, content) in enumerate(damaged.items()):
            line = lines[known[index % len(known)]]
            yield Command(f"{line[0]} with {name} {what}", line, (name,), _replacing(folder, name, content))
        for reader in known:
            yield Command(f"{reader} without {name}", lines[reader], (name,), _replacing(folder, name, None))
            yield Command(f"{reader} with a folder as {name}", lines[reader], (name,), _replacing(folder, name, Path()))


def _replacing(folder: Path, name: str, content: bytes | Path | None) -> Callable[[], None]:
    """Makes a copy of the run in which one file has that content, is a folder (a path), or is not there (None)."""

    def prepare() -> None:
        run = folder / "bad run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folder / "run", run)
        (run / name).unlink()
        if isinstance(content, bytes):
            (run / name).write_bytes(content)
        elif content is not None:
            (run / name).mkdir()

    return prepare


def _tables(folder: Path) -> Iterator[Command]:
    for path in _written(
        folder / "bad networks", dict(_named(broken(".onnx", (folder / "model.onnx").read_bytes()), ".onnx"))
    ):
        yield Command(f"verify {path.name}", ("verify", str(path), "run"), (str(path),))
    for what, name in special(folder / "bad networks", ".onnx"):
        yield Command(f"verify {what}", ("verify", name, "run"), (shortened(name) or ".",))
    export: Words = {
        "--target": ("", "nonsense", "ONNX"), "--input-names": ("", "a,b", ","), "--output-names": ("", "a,a", "a,b,c"),
    }  # fmt: skip
    verify: Words = {
        "--bound": ("2", "-1", "nan", "x", "inf"), "--target": ("nonsense",), "--inputs": ("nowhere.npy", "subject.py"),
        "--evaluate": ("subject:text", "x"),
    }  # fmt: skip
    latency: Words = {
        "--bits": ("", "w9a8", ","), "--threads": ("0", "-1", "x", "9" * 30), "--batch": ("0", "-1", "100", "x"),
        "--inputs": ("nowhere.npy",),
    }  # fmt: skip
    lines: tuple[tuple[tuple[str, ...], Words], ...] = (
        (("export", "run", "x.onnx"), export), (("verify", "model.onnx", "run"), verify),
        (("latency", "run", "-o", "x.csv"), latency),
    )  # fmt: skip
    for line, words in lines:
        for option, texts in words.items():
            for text in texts:
                named = (option[2:], option[2:].replace("-", "_"), text or "bits")
                yield Command(f"{line[0]} {option} {text!r}", (*line, f"{option}={text}"), named)
    for option in ("--size", "--bops", "--latency", "--max-loss", "--minimize"):
        for text in WRONG[option]:
            if "," not in text:
                yield Command(
                    f"plan {option} {text[:40]!r}",
                    ("plan", "run", f"{option}={text}"),
                    (
                        option[2:],
                        option[2:].replace("-", "_"),
                        shortened(text) or " ",
                        text.rpartition("=")[0],
                        "milliseconds",
                        "loss",
                    ),
                )
    cells = {"empty": b"", "no header": b"0,w8a8,1\n", "two columns": b"layer,bits\n",
        "no number": b"layer,bits,milliseconds\n0,w8a8,x\n", "negative": b"layer,bits,milliseconds\n0,w8a8,-1\n",
             "twice": b"layer,bits,milliseconds\n0,w8a8,1\n0,w8a8,2\n", "not text": b"\xff\xfe\x00",
             "NUL": b"layer,bits,milliseconds\n0\0,w8a8,1\n", "binary": bytes(300),
             "vast": b"layer,bits,milliseconds\n0,w8a8," + b"9" * 6000,
             "wide": b"layer,bits,milliseconds\n" + b"x" * 200_000 + b",w8a8,1\n",
             "missing": b"layer,bits,milliseconds\n0,w8a8,1\n",
             "quote": b'layer,bits,milliseconds\n"0,w8a8,1\n'}  # fmt: skip
    for path in _written(folder / "bad tables", dict(_named(cells.items(), ".csv"))):
        yield Command(
            f"table {path.name}", quantize("--bits", "w8a8,w4a4", "--latency", f"{path}=4"), (str(path), "latency")
        )
    for what, name in special(folder / "bad tables", ".csv"):
        if what not in ("no name",):
            yield Command(
                f"table {what}", quantize("--bits", "w8a8,w4a4", "--latency", f"{name}=4"), (shortened(name), "latency")
            )


def _named(items: Iterable[tuple[str, bytes]], suffix: str) -> Iterator[tuple[str, bytes]]:
    yield from ((f"{what}{suffix}", content) for what, content in items)
