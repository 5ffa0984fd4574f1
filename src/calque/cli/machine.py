"""The machine that Python runs on: operating system, processor, memory. Knows no torch."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# What the integer kernels of runtimes use, and the flags of /proc/cpuinfo that say it, any of them.
FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_int8",),
    "NEON dot product": ("asimddp",),
    "NEON int8 matmul": ("i8mm",),
}
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
LIMITS = (  # bytes that a container may take, in one of these
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine says of itself.

    Attributes:
        system: operating system and kernel.
        processor: its name.
        features: those of FEATURES that it has; None where the system does not tell.
        cores, usable_cores: logical ones, and those that this process may use.
        memory: bytes that this process may take; None where the system does not tell.
    """

    system: str
    processor: str
    features: tuple[str, ...] | None
    cores: int
    usable_cores: int
    memory: int | None


def this_machine() -> Machine:
    """What can be told without a library."""
    text = _text(CPUINFO)
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return Machine(
        f"{platform.system()} {platform.release()} ({platform.machine()})", processor_name(text) or _other_name(),
        processor_features(text), cores, usable, _memory(),
    )  # fmt: skip


def processor_name(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo; "" where there is none.

    >>> processor_name("processor\\t: 0\\nmodel name\\t: Fast  CPU @ 2GHz\\n")
    'Fast CPU @ 2GHz'
    """
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def processor_features(cpuinfo: str) -> tuple[str, ...] | None:
    """Those of FEATURES that the text of /proc/cpuinfo lists; None where it lists nothing.

    >>> processor_features("flags\\t: fpu avx2 avx512f avx512_vnni\\n")
    ('AVX2', 'AVX-512', 'VNNI')
    """
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if found is None:
        return None
    flags = set(found[1].split())
    return tuple(name for name, any_of in FEATURES.items() if flags.intersection(any_of))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # other systems than Linux have no such file
        return ""


def _other_name() -> str:
    """The processor's name on systems without /proc."""
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(MEMINFO), re.MULTILINE)
    amounts = [int(found[1]) * 1024] if found else []
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        amounts.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    amounts += [int(text) for path in LIMITS if (text := _text(path).strip()).isdecimal()]
    return min(amounts, default=None)
