"""Faults on purpose, for tests: LOCKSTEP_FAULT="kill@step=23,rank=1,life=0"; off unless set.

Several plans are separated by `;`. What happens: kill, exit0, stop (SIGSTOP), term, usr1, raise,
oom, hang, enospc, nan (told to the caller). Where: `point` (step, backward, evaluate, fold, data,
start, save:begin, save:written, save:manifest, save:renamed, save:pruned; snapshot:begin and so
on), or `step` alone.
"""

import contextlib
import errno
import os
import signal
import time

_plans: list[dict] = []
_rank = 0
_life = 0


def configure(rank: int, life: int) -> None:
    """Read the plan; called once by each process when its life begins."""
    global _rank, _life
    _rank, _life = rank, life
    _plans.clear()
    for text in filter(None, os.environ.get("LOCKSTEP_FAULT", "").split(";")):
        action, _, conditions = text.partition("@")
        plan = {"action": action, "point": "step"}
        plan |= dict(pair.split("=", 1) for pair in conditions.split(",") if pair)
        _plans.append(plan)


def hit(point: str, step: int = -1) -> bool:
    """Do what the plan says for this point; True asks the caller to poison its numbers."""
    if not _plans:
        return False
    return any([_fire(plan, point, step) for plan in _plans])


def _fire(plan: dict, point: str, step: int) -> bool:
    wanted = {"rank": _rank, "life": _life, "step": step}
    if plan["point"] != point:
        return False
    if any(key in plan and int(plan[key]) != value for key, value in wanted.items()):
        return False
    signals = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM", "usr1": "SIGUSR1"}
    match plan["action"]:
        case "nan":
            return True
        case "raise":
            raise RuntimeError(f"planned fault at {point}, step {step}")
        case "oom":
            raise MemoryError("planned fault: out of memory")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "hang":
            time.sleep(float(plan.get("seconds", 3600)))
        case "exit0":
            os._exit(0)
        case action if action in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(os.getpid(), getattr(signal, signals[action]))
    return False
