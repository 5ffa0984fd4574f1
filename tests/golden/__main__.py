"""Compares the codes of today with the recorded ones: python -m golden [--record] [--only NAME ...]

`--record` writes the hashes of this environment, for a commit that is trusted.
"""

import argparse
import sys
import time

import torch

from golden.cases import cases
from golden.record import environment, fingerprint, load, save


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(cases()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record, here = load(), environment()
    known, different = record.setdefault(here, {}), 0
    for name in arguments.only:
        started = time.perf_counter()
        found = fingerprint(cases()[name]())
        state = "new" if name not in known else "equal" if known[name] == found else "DIFFERENT"
        different += state == "DIFFERENT"
        print(f"{name:24} {found} {state} {time.perf_counter() - started:.1f} s", flush=True)
        if arguments.record:
            known[name] = found
            save(record)
    sys.exit(int(different > 0 and not arguments.record))


if __name__ == "__main__":
    main()
