"""Who started this process: asked before anything slow is imported, for it may be gone by then."""

import os

_parent = os.getppid()


def orphaned() -> bool:
    """Whether who started this process has ended since."""
    return os.getppid() != _parent


def launched() -> bool:
    """Whether a launcher stands above this process, whose death must not leave us behind."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _born() -> None:
    global _parent
    _parent = os.getppid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_born)
