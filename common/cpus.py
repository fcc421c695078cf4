"""How much of the machine this process may use."""

import contextlib
import os
from pathlib import Path


def cpus() -> int:
    """The CPUs that this process may use: its affinity and quota."""
    have = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    if hasattr(os, "sched_getaffinity"):
        have = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        have = min(have, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return have


def memory() -> int:
    """Bytes of memory of this machine, or of what a job may use of it."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such question here: not much is sure
        found = 8 * 2**30
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(file).read_text()))
    return found
