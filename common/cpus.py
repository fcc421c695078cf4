"""How much of the machine this process may use."""

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
