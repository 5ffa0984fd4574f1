"""Runs every file of a folder in the ONNX Runtime that is installed: python runtime_probe.py FOLDER.

It needs nothing but onnxruntime and numpy, and prints one line of JSON per file. Beside NAME.onnx, NAME.npz has the inputs
under their names and what the outputs should be, in order, under "expected_0", "expected_1", ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PRECISE = {
    "session.x64quantprecision": "1",
    "session.qdq_matmulnbits_accuracy_level": "1",
}  # as `calque.verify` sets them


def row(path: Path) -> dict[str, Any]:
    """What becomes of one file: the error's first line, or the share of values that are equal, the optimizer on and off."""
    found: dict[str, Any] = {"file": path.stem, "runtime": ort.__version__}
    levels = ort.GraphOptimizationLevel
    try:
        for name, level in (("equal", levels.ORT_ENABLE_ALL), ("equal_plain", levels.ORT_DISABLE_ALL)):
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.graph_optimization_level = level
            for key, value in PRECISE.items():
                options.add_session_config_entry(key, value)
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            known = np.load(path.with_suffix(".npz"))
            outputs = session.run(None, {value.name: known[value.name] for value in session.get_inputs()})
            found[name] = [equal(output, known[f"expected_{place}"]) for place, output in enumerate(outputs)]
    except Exception as error:
        found["error"] = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return found


def equal(output: Any, expected: Any) -> float:
    """The share of values that are the expected ones, as far as float32 sums in another order are."""
    if output.shape != expected.shape:
        return 0.0
    return float(np.isclose(output, expected, rtol=1e-5, atol=1e-5).mean())


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).glob("*.onnx")):
        print(json.dumps(row(file)), flush=True)
