"""Outputs, how close they are, peak memory, and the commit that a figure belongs to."""

import math
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.rows import Row

FOLDER = Path(__file__).resolve().parent
BATCH = 50


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    size = BATCH if inputs[0].numel() < 50_000 else 10
    return torch.cat([model(batch) for batch in torch.split(inputs, size)])


def fidelity(reference: Tensor, quantized: Tensor, classifier: bool) -> Row:
    """KL(float || quantized) in nats, top-1 agreement, and the signal-to-noise ratio of the outputs in dB."""
    noise = (reference - quantized).double().square().mean().clamp(min=1e-30)
    sqnr = 10 * math.log10(reference.double().square().mean().item() / noise.item())
    if not classifier:
        return {"kl": None, "agreement": None, "sqnr": sqnr}
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(quantized.double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return {
        "kl": kl,
        "agreement": (reference.argmax(-1) == quantized.argmax(-1)).double().mean().item(),
        "sqnr": sqnr,
    }


def same(a: Tensor, b: Tensor) -> float:
    """Share of rows with the same top-1, or of equal values where the outputs are images."""
    if a.dim() == 2:
        return (a.argmax(1) == b.argmax(1)).double().mean().item()
    return torch.isclose(a, b, rtol=0, atol=1e-6).double().mean().item()


def reset_peak() -> int:
    """Resets this process's peak memory (Linux) and returns its resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_bytes() -> int:
    return status("VmHWM")


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def commit() -> str:
    """The commit of the code, and whether the code was edited since; the rows themselves are no code."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=FOLDER, check=False)
        return done.stdout.strip()

    edited = git("status", "--porcelain", "--", "../../src", "../*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if edited else "")
