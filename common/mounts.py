"""Which file system a path lies on, and whether other machines can see it."""

import re
from pathlib import Path

# Kinds that one machine has for itself (unless it exports them). Of others nothing is said.
OWN = frozenset(
    {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
)
MOUNTS = Path("/proc/self/mounts")


def own_disk(path: Path, mounts: Path = MOUNTS) -> str:
    """`tmpfs at /tmp` for a path on a disk of this machine's own, which need not exist yet.

    "" on any other, and where the system does not tell.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        place, best = path.expanduser().resolve(), ("", "")
    except OSError:
        return ""
    for _, point, kind, *_ in (line.split(" ") for line in lines if line.count(" ") > 2):
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)
        if place.is_relative_to(point) and len(point) >= len(best[0]):  # the later one lies on top
            best = point, kind
    return f"{best[1]} at {best[0]}" if best[1] in OWN else ""
