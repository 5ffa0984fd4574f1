"""Measures calque beside its peers: python -m benchmarks.peers

Each peer is installed in a virtual environment of its own below --folder; a row is one call of one tool in a process of its
own, on one thread. Rows go to benchmarks/results/peers.jsonl as they are measured, so that a run can be stopped and goes on
where it was; benchmarks/results/peers.md, benchmarks/results/peers.svg and the README's docs/images/peers.svg are written
from them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.measure import commit, fidelity
from benchmarks.common.rows import RESULTS, Row, is_asked, measure_rows, read_rows
from benchmarks.common.tasks import load
from benchmarks.peers.cases import FIELDS, PACKAGES, SETTINGS, TOOLS, Key, cases
from benchmarks.peers.front import draw_front
from benchmarks.peers.table import draw, table

ROOT = Path(__file__).resolve().parents[2]
ROWS = RESULTS / "peers.jsonl"
FRONT = ROOT / "docs" / "images" / "peers.svg"  # the README's
TIMEOUT = 3 * 3600  # seconds for one row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=SETTINGS)
    parser.add_argument("--bits", nargs="+")
    parser.add_argument("--tools", nargs="+", choices=TOOLS)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--folder", type=Path, default=ROOT / ".peers", help="environments, images and logits")
    parser.add_argument("--table", action="store_true", help="only write the table and the plot")
    parser.add_argument("--again", action="store_true", help="measure again the rows asked for")
    arguments = parser.parse_args()
    asked = (arguments.networks, arguments.bits, arguments.tools, arguments.methods, arguments.seeds)
    wanted = [] if arguments.table else [key for key in cases() if is_asked(key, asked)]
    measured = partial(measure, arguments.folder.resolve(), arguments.again)
    measure_rows(arguments.rows, FIELDS, wanted, measured, write, again=arguments.again)


def write(rows: Path) -> None:
    found = list(read_rows(rows, FIELDS).values())
    rows.with_suffix(".md").write_text(table(found), encoding="utf-8")
    draw(found, rows.with_suffix(".svg"))
    if rows == ROWS:
        draw_front(found, FRONT)


def measure(folder: Path, again: bool, network: str, bits: str, tool: str, method: str, seed: int) -> Row:
    """One row; where the tool fails, a row with the reason.

    Args:
        again: whether the tool runs even where an earlier run left its logits.
    """
    key = network, bits, tool, method, seed
    row: Row = {**dict(zip(FIELDS, key, strict=True)), "machine": platform.machine(), "commit": commit()}
    lay(network, folder / "data" / network)
    logits = folder / "runs" / f"{' '.join(map(str, key))}.npy"
    logits.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = logits.with_suffix(".json")
        if again or not (logits.is_file() and report.is_file()):
            report.write_text(run(key, folder, logits), encoding="utf-8")
        row |= json.loads(report.read_text(encoding="utf-8"))
        return row | judge(folder / "data" / network, logits)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return row | {"failed": str(error).strip()[-300:]}


def run(key: Key, folder: Path, logits: Path) -> str:
    """The last line that the tool's adapter prints, a row as JSON.

    Raises:
        RuntimeError: the environment could not be made or the adapter failed; with the last line of its errors.
    """
    network, bits, tool, method, seed = key
    python = sys.executable if tool == "calque" else str(environment(tool, folder))
    options = {"folder": folder / "data", "network": network, "bits": bits, "method": method, "seed": seed}
    command = [python, "-m", f"benchmarks.peers.peer_{tool}", "--output", str(logits)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **threads}, timeout=TIMEOUT, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.strip().splitlines()[-1]


def environment(tool: str, folder: Path) -> Path:
    """The Python of the tool's virtual environment, which is made where it is absent."""
    home = folder / tool
    python, stamp = home / "bin" / "python", home / "installed.txt"
    wanted = "\n".join(PACKAGES[tool])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    started = time.perf_counter()
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", *PACKAGES[tool]],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"cannot install {tool}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    stamp.write_text(wanted, encoding="utf-8")
    print(f"{tool}: environment in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return python


def lay(network: str, folder: Path) -> None:
    """Puts the float network, its images, labels and logits where every adapter finds them."""
    if (folder / "labels.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    task, setting = load(network), SETTINGS[network]
    test = task.test[: setting.test]
    torch.save(task.model, folder / "model.pt")
    np.save(folder / "calibration.npy", task.calibration[: setting.calibration].numpy())
    np.save(folder / "test.npy", test.numpy())
    with torch.no_grad():
        np.save(folder / "reference.npy", torch.cat([task.model(batch) for batch in test.split(50)]).numpy())
    np.save(folder / "labels.npy", labels(network)[: setting.test])


def labels(network: str) -> np.ndarray:
    from zoo.tasks import DATA, imagenet_pixels

    if network.endswith("imagenet"):
        return np.asarray(imagenet_pixels("val")[1])
    return np.asarray(np.load(DATA / "cifar10" / "cifar10_lossless.npz")["y_test"])


def judge(folder: Path, logits: Path) -> Row:
    """Fidelity and score of the logits of any tool, by the same code for all of them."""
    reference, received = (torch.from_numpy(np.load(path)) for path in (folder / "reference.npy", logits))
    answers = torch.from_numpy(np.load(folder / "labels.npy"))

    def score(outputs: torch.Tensor) -> float:
        return 100 * (outputs.argmax(1) == answers).double().mean().item()

    return {
        "test": len(received),
        "score_float": score(reference),
        "score": score(received),
        **fidelity(reference, received, classifier=True),
    }


if __name__ == "__main__":
    main()
