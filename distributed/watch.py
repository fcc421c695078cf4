"""Names a dead or stuck process: heartbeats, stack dumps, and who is to blame.

Every process writes `crash/heartbeat-<rank>.json` every second from a thread of its own. Who
stands still for longer than the limit (LOCKSTEP_STALL, 300 s) dumps its stacks, and the process
that is least far, or whose heartbeat stopped, is named: not the innocent one that waits for it.
Who stands still for ten seconds while another process is dead ends too: NCCL would wait on.
"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from common.disk import write_text

PHASES = ("start", "data", "step", "evaluate", "save", "end")
BEAT_SECONDS = 1.0
PEER_SECONDS = 10.0  # of standing still, after which one looks whether a peer is dead


class Watch:
    """This process's place in the run, told to the others through files."""

    def __init__(self, rank: int, num_processes: int):
        self.rank, self.num_processes = rank, num_processes
        self.phase, self.step, self.device = "start", 0, ""
        self.folder: Path | None = None
        self.limit = float(os.environ.get("LOCKSTEP_STALL", "300"))
        self.on_beat: Callable[[], None] = lambda: None
        self.on_stall: Callable[[str], None] = lambda message: None
        self.before_the_end: Callable[[], None] = lambda: None
        # Reading data and drawing pictures have no beats of their own: six times as long; the loop
        # adds phases in which a compiler may sit.
        self.patient = {"start", "end"}
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, phase: str, step: int) -> None:
        """The loop says where it is; costs no more than three assignments."""
        self.phase, self.step, self._since = phase, step, time.monotonic()

    @property
    def still(self) -> float:
        """Seconds since the loop last said where it is."""
        return time.monotonic() - self._since

    def start(self, folder: Path, limited: bool = True) -> None:
        """Beat from now on; without a limit where a person may sit in a debugger."""
        self.limit = self.limit if limited else math.inf
        self.folder = folder / "crash"
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (f"heartbeat-{self.rank}.json", f"rank-{self.rank}.txt"):
            (self.folder / name).unlink(missing_ok=True)
        self._since = time.monotonic()  # what an earlier life left is gone before anyone looks
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave without a trace: a crash folder that stays tells of a crash."""
        self._stop.set()
        if self._thread is None or self.folder is None:
            return
        self._thread.join()
        with contextlib.suppress(OSError):
            (self.folder / f"heartbeat-{self.rank}.json").unlink(missing_ok=True)
            self.folder.rmdir()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            asleep = time.monotonic() - last - BEAT_SECONDS
            last = time.monotonic()
            if asleep > BEAT_SECONDS:  # all of this process stood still: Ctrl-Z, a suspended job
                self._since += asleep
            with contextlib.suppress(MemoryError, RuntimeError):  # a beat without memory is missed
                self._beat()
                self.on_beat()
            still = self.still
            if still > self.limit * (6 if self.phase in self.patient else 1):
                self._stalled()
            # The main process's end (tables, pictures) is its own: it waits for nobody there.
            alone = self.num_processes == 1 or (self.rank == 0 and self.phase == "end")
            if still > PEER_SECONDS and not alone and (dead := self.dead_peer()):
                self._leave_after(dead)

    def _file(self, name: str) -> Path:
        """In the folder that `start` named."""
        assert self.folder is not None
        return self.folder / name

    def _beat(self) -> None:
        place = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": self.device,
            "phase": self.phase,
            "step": self.step,
            "still": round(self.still, 1),
            "time": time.time(),
        }
        path = self._file(f"heartbeat-{self.rank}.json")
        with contextlib.suppress(OSError):
            write_text(path, json.dumps(place), sync=False)

    def _stalled(self) -> None:
        """Dump every thread's stack, name the culprit, and end: a hang must not last."""
        self._dump(f"stood still for {self.limit:.0f} s in phase {self.phase}, step {self.step}")
        time.sleep(3 * BEAT_SECONDS)  # let the others write theirs
        self._end(self.blame() or f"rank {self.rank} stood still at step {self.step}")

    def _leave_after(self, dead: str) -> None:
        """The main thread waits for a process that will never come, and may not hear of it."""
        message = f"rank {self.rank} ends too, because {dead}"
        self._dump(message)
        self._end(message)

    def _dump(self, why: str) -> None:
        unwritten = contextlib.suppress(OSError, MemoryError)
        with unwritten, self._file(f"rank-{self.rank}.txt").open("w") as f:
            f.write(f"{why}\n")
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)

    def _end(self, message: str) -> None:
        words = f"\n{message}\nstacks of all processes: {self.folder}"
        for last in (
            self.before_the_end,
            lambda: self.on_stall(message),
            lambda: print(words, file=sys.stderr, flush=True),
        ):
            # What fails of a failing process stops no other, nor the end.
            with contextlib.suppress(BaseException):
                last()
        os._exit(1)

    def _places(self) -> dict[int, dict]:
        """Rank -> what its last heartbeat says.

        Not of an earlier life that had more processes: nobody removes what those left.
        """
        places = {}
        for path in (self.folder or Path()).glob("heartbeat-*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                place = json.loads(path.read_text(encoding="utf-8"))
                if place["rank"] < self.num_processes:
                    places[place["rank"]] = place
        return places

    def where(self, rank: int) -> str:
        """Which process that is, in words."""
        if (place := self._places().get(rank)) is None:
            return f"rank {rank}"
        device = f", {place['device']}" if place["device"] else ""
        return f"rank {rank} on {place['host']} (pid {place['pid']}{device})"

    def dead_peer(self) -> str:
        """Another process that failed with a report, or is gone from this host; '' if none is."""
        for rank, place in sorted(self._places().items()):
            if rank == self.rank:
                continue
            with contextlib.suppress(OSError):
                report = self._file(f"rank-{rank}.txt").read_text(errors="replace")
                if "Traceback" in report:
                    return report.splitlines()[0]
            if place["host"] == socket.gethostname() and not alive(place["pid"]):
                return last_seen(place, "died without a word (killed, or out of memory)")
        return ""

    def blame(self) -> str:
        """Which process is dead, frozen or behind, in one sentence; '' if none can be told."""
        if dead := self.dead_peer():
            return dead
        places = self._places()
        for rank, place in sorted(places.items()):
            if rank != self.rank and time.time() - place["time"] > 5 * BEAT_SECONDS:
                return last_seen(place, "is frozen (no heartbeat)")
        if self.num_processes > 1 and len(places) == self.num_processes:
            last = min(places.values(), key=lambda p: (p["step"], PHASES.index(p["phase"])))
            others = [p for p in places.values() if p is not last]
            if all((p["step"], p["phase"]) != (last["step"], last["phase"]) for p in others):
                return (
                    f"rank {last['rank']} on {last['host']} (pid {last['pid']}) is stuck at step "
                    f"{last['step']}, phase {last['phase']}; the others wait for it"
                )
        return ""

    def leave(self, error: BaseException) -> str:
        """A mistake: where the main process leaves too, nobody crashed; else the report stays.

        Returns what to tell, because nobody else will; '' where the main process does.
        """
        if self.folder is None:
            return ""
        for _ in range(30):
            if not (self.folder / "heartbeat-0.json").exists():
                self.stop()
                return ""
            time.sleep(0.1)
        self.report(error)
        return f"rank {self.rank} on {socket.gethostname()}: {error}"

    def report(self, error: BaseException) -> str:
        """Write this process's crash report; the sentence to print last."""
        text = "".join(traceback.format_exception(error))
        own = f"rank {self.rank} on {socket.gethostname()} failed at step {self.step}, phase "
        own += f"{self.phase}: {type(error).__name__}: {error}"
        if out_of_memory(error):
            own += (
                "\nout of memory: in a new run, try a smaller --batch-size or --image-size, "
                'or more --accumulate (smaller pieces); more at the row "out of memory" in '
                "docs/troubleshooting.md"
            )
        if peer_failed(error):
            time.sleep(1.5)  # the one that failed first may still be writing its report
            blamed = self.blame()
            if blamed:
                return f"rank {self.rank} ends too, because {blamed}"
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / f"rank-{self.rank}.txt").write_text(f"{own}\n\n{text}")
                own += f"\nthe traceback is in {self.folder / f'rank-{self.rank}.txt'}"
        return own


def failed_at_start(error: BaseException) -> str:
    """The last words of a process that failed before it had a watch."""
    who = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    message = f"{who} failed at its start: {type(error).__name__}: {error}"
    if "gloo" in str(error).lower() and "GLOO_SOCKET_IFNAME" not in os.environ:
        message += (
            "\ngloo connects by the hosts' own names, which may not lead from node to node: on "
            "each, type export GLOO_SOCKET_IFNAME=eth0 first, with the interface that "
            f"`ip route get {os.environ.get('MASTER_ADDR', 'HEAD')}` names"
        )
    return message


def tell_agent(error: BaseException) -> None:
    """Leave the error where torchrun looks for it, so that its report names the right process."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def last_seen(place: dict, what: str) -> str:
    """Which process, what became of it, and where it was."""
    return (
        f"rank {place['rank']} on {place['host']} (pid {place['pid']}) {what}, last seen at step "
        f"{place['step']}, phase {place['phase']}"
    )


def out_of_memory(error: BaseException) -> bool:
    """Of a device or of the host: torch says it in several ways."""
    words = ("out of memory", "allocate memory", "not enough memory", "failed to cuda calloc")
    words += ("cudnn_status_alloc_failed", "cublas_status_alloc_failed")
    return isinstance(error, MemoryError) or any(w in str(error).lower() for w in words)


def device_failed(error: BaseException) -> bool:
    """Whether a GPU or its libraries failed, whatever a model did: none of its author's business.

    "cuda:0" in small letters stands in messages about tensors on two devices.
    """
    words = ("CUDA", "CUDNN", "cuDNN", "CUBLAS", "NCCL")
    return isinstance(error, torch.AcceleratorError) or any(w in str(error) for w in words)


def peer_failed(error: BaseException) -> bool:
    """Whether an error only says that another process went away."""
    words = ("connection closed by peer", "connection reset", "timed out waiting", "broken pipe")
    words += ("remote process", "nccl", "gloo")
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


def alive(pid: int) -> bool:
    """Whether a process of this host still runs (a zombie does not)."""
    if os.name == "nt":  # there, os.kill ends the process whatever the signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
