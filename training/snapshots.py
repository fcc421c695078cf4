"""Snapshots: a checkpoint in the memory of each node, for the life that follows a kill.

`/dev/shm/lockstep-USER-RUN-NODE/step-000000123` is written as a checkpoint on the disk is, by the
first process of each node, and holds what that holds. It outlives the processes, not the machine:
a node that came new gets its copy from another one.
"""

import contextlib
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, cast

import psutil
import torch
import torch.distributed as dist

from common.disk import digest, read_json, write_text
from common.errors import UserError
from common.parent import launched
from common.text import seconds
from config import MAY_CHANGE, TrainConfig
from distributed.accelerator import wait_limit
from distributed.checkpoint import Progress, Writer, capture, read_progress, sweep, verify, visible
from distributed.world import World
from models.state import whole_state
from training.learner import Learner
from training.plan import Plan
from training.run_dir import RunDir

LEAST = 2.0  # seconds from one to the next
SHARE = 100  # and so many times what one costs: at most 1 % of the time
ROOM = 3  # times its size: the one before, the new one, and the copy that is written from
PIECE = 64 * 2**20  # bytes of a broadcast
YOUNG = 60.0  # seconds in which a folder may yet get its owner's name
CGROUPS = Path("/sys/fs/cgroup")


class Held(NamedTuple):
    """The newest snapshot that a node can go on from."""

    path: str
    step: int


class Run(NamedTuple):
    """A run as its folder tells it: a name of its own, where each life went on, rows it has."""

    key: str
    lives: list[int]
    rows: int


# --- folders in memory ---------------------------------------------------------------------------


def memory_folder() -> Path | None:
    """Where files lie in memory (LOCKSTEP_SHM, or Linux's /dev/shm); None on other systems."""
    root = Path(os.environ.get("LOCKSTEP_SHM") or "/dev/shm")
    return root if hasattr(os, "geteuid") and root.is_dir() else None


def room(root: Path) -> int:
    """Bytes that may still be written there, of the machine's memory and of a job's (cgroup)."""
    free = min(shutil.disk_usage(root).free, psutil.virtual_memory().available)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kind, place = line.split(":", 2)
            if kind in ("", "memory"):
                free = min(free, room_of_group(CGROUPS / kind, place))
    return free


def room_of_group(top: Path, place: str) -> int:
    """What the limits of a control group and of those above it leave; files it read make way."""
    left, folder = sys.maxsize, top / place.strip("/")
    for level in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            names = ("memory.max", "memory.current", "inactive_file")
            if not (level / names[0]).exists():  # the first version of control groups
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            limit, used = (int((level / name).read_text()) for name in names[:2])
            counts = dict(map(str.split, (level / "memory.stat").read_text().splitlines()))
            left = min(left, limit - used + int(counts.get(names[2], 0)))
        if level == top:
            break
    return left


def is_ours(path: Path) -> bool:
    """Whether this is a folder of this user's, closed to all others."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o77


def identity(pid: int) -> str:
    """A process as no later one will be: boot, PID namespace, number, start; "" if it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot} {space} {pid} {fields[19]}"


def is_dead(home: Path) -> bool:
    """Whether nobody is left who would go on from this folder; of other containers one sees none.

    The owner is the launcher, where there is one: it starts the next life.
    """
    owner = read_owner(home)
    try:
        boot, space, pid, _ = owner.split()
    except ValueError:
        with contextlib.suppress(OSError):
            return time.time() - home.stat().st_mtime > YOUNG
        return False
    ours = identity(os.getpid()).split()
    if boot == ours[0] and space != ours[1]:
        return False
    return identity(int(pid)) != owner


def remove_dead(root: Path, key: str) -> None:
    """Remove what other runs of this user left that were killed and not gone on with."""
    for home in root.glob(f"lockstep-{os.geteuid()}-*"):
        if f"-{key}-" not in home.name and is_ours(home) and is_dead(home):
            shutil.rmtree(home, ignore_errors=True)


def homes(root: Path, key: str) -> list[Path]:
    """This node's folders of a run: a node may have had another number in the life before."""
    if not key:
        return []
    return [p for p in root.glob(f"lockstep-{os.geteuid()}-{key}-*") if is_ours(p)]


def run_of(folder: Path) -> Run:
    """The run in a folder, by its place and its birth; a key of "" where there was none yet."""
    lives = read_json(folder / "status.json", {}).get("lives") or []
    if not lives or "born" not in lives[0]:
        return Run("", [], 0)
    key = digest(f"{folder.resolve()} {lives[0]['born']}")
    return Run(key, [life["step"] for life in lives], len(RunDir(folder).metrics_lines()))


def in_memory(folder: Path) -> list[str]:
    """The snapshots that this computer holds of a run, a line for each."""
    root, run = memory_folder(), run_of(folder)
    paths = [p for home in homes(root, run.key) for p in visible(home)] if root else []
    return [f"step {step_of(p)}: {megabytes(size_of(p))} in {p.parent}" for p in paths]


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def size_of(path: Path) -> int:
    """Bytes of the files of a checkpoint's folder."""
    return sum(p.stat().st_size for p in path.iterdir())


def megabytes(size: float) -> str:
    """`0.0213 MB`, `1,234 MB`."""
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def restartable(world: World) -> bool:
    """Whether somebody may start this run again after a kill: several processes, or an agent."""
    return world.num_processes > 1 or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def settings_of(config: TrainConfig) -> str:
    """One digest of all settings but those that a run may change as it goes on."""
    values = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    return digest(repr(sorted(values.items())))


# --- those of a run ------------------------------------------------------------------------------


class Snapshots:
    """Taken of one run, on all nodes at the same step, and found by its next life.

    `in_words` is for the start panel, "" where none are wanted; `source` says what the life went
    on from. All processes take part in `find`, `fetch`, `begin`, `take`; the first of each node
    writes.
    """

    def __init__(self, plan: Plan, facts: dict[str, str], world: World) -> None:
        every = plan.config.snapshot_every
        self.plan, self.world = plan, world
        self.facts = {name: value for name, value in facts.items() if name != "processes"}
        self.facts["settings"] = settings_of(plan.config)
        self.reads = plan.folder is not None and every != "off" and not plan.actions.debug
        self.takes = self.reads and (every != "auto" or restartable(world))
        self.steps = int(every) if every.isdigit() else 0
        self.least = LEAST if self.steps or every in ("auto", "off") else seconds(every)
        self.in_words = self.source = ""
        self.run = Run("", [], 0)
        self.writer: Writer | None = None
        self._root = memory_folder()
        self._writes = world.accelerator.is_local_main_process
        self._owner = identity(os.getppid() if launched() else os.getpid()) if self._root else ""
        self._held: list[tuple[str, Held | None]] = []  # of each rank: its node, what it holds
        self._size, self._paused = 0, 0.0
        self._note: Callable[[str], None] = lambda text: None
        self._warn = self._note
        self._named = self._told = self._gave_up = False

    # --- the beginning of a life

    def find(self, warn: Callable[[str], None]) -> int:
        """The step of the newest snapshot that a node holds of this run; 0: none does."""
        if not self.reads:
            return 0
        self.run = self.world.main_decides(lambda: run_of(Path(str(self.plan.folder))))
        held, problems = self._on_this_node() if self.run.key and self._writes else (None, [])
        everyone = self.world.everyones((self._node(), held, problems))
        for node, _, problems in everyone:
            for problem in problems:
                warn(f"{node}: {problem}")
        self._held = [(node, found) for node, found, _ in everyone]
        return max((found.step for _, found in self._held if found), default=0)

    def _node(self) -> str:
        return f"node {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"

    def _on_this_node(self) -> tuple[Held | None, list[str]]:
        """The newest one that is whole and this run's, and why others are not used."""
        found, problems = None, []
        for home in homes(self._root, self.run.key) if self._root else ():
            sweep(home)
            for path in visible(home):
                if found and step_of(path) <= found.step:
                    continue
                if why := self._unfit(path):
                    problems.append(f"the snapshot of step {step_of(path)} is not used: {why}")
                else:
                    found = Held(str(path), step_of(path))
        return found, problems

    def _unfit(self, path: Path) -> str:
        """Why this life cannot go on from there; "" if it can."""
        try:
            facts = verify(path)["facts"]
            progress = read_progress(read_json(path / "progress.json", {}))
        except (ValueError, KeyError, TypeError, UserError) as error:
            return f"it is damaged: {error}"
        other = [name for name, value in self.facts.items() if facts.get(name) != value]
        if other:
            return f"it was taken with other {' and other '.join(other)}"
        if any(began < progress.step for began in self.run.lives[facts.get("life", 0) + 1 :]):
            return "a later life went on from before it"
        if progress.metrics_rows > self.run.rows:
            return "metrics.jsonl lacks its last rows"
        return ""

    def fetch(self, warn: Callable[[str], None]) -> Path | None:
        """This node's copy of the newest snapshot, from a peer where it has none.

        None on all where one cannot have it.
        """
        best = max(found.step for _, found in self._held if found)
        having = {node: found.path for node, found in self._held if found and found.step == best}
        nodes = [node for node, _ in self._held]
        first = {node: nodes.index(node) for node in nodes}  # its first process
        source = next(r for r, (_, found) in enumerate(self._held) if found and found.step == best)
        needy = [rank for node, rank in first.items() if node not in having]
        mine, problem = having.get(self._node(), ""), ""
        if needy:
            here = dist.get_rank()
            if here in needy:
                mine, problem = self._receive(source, needy, best)
            else:
                send(Path(mine) if here == source else None, None, [source, *needy])
            everyone = self.world.everyones((self._node(), mine if self._writes else "", problem))
            if problems := [f"{node}: {said}" for node, _, said in everyone if said]:
                warn(f"the snapshot in memory cannot be had by all: {problems[0]}")
                return None
            mine = next(path for node, path, _ in everyone if path and node == self._node())
        names = ", ".join(nodes[rank] for rank in needy)
        peer = f"; {names} got it from {nodes[source]}" if needy else ""
        self.source = f"from the snapshot in memory{peer}"
        return Path(mine)

    def _receive(self, source: int, needy: list[int], step: int) -> tuple[str, str]:
        """Take part as a node that has no copy: where it is then, or what went wrong."""
        home = self._home()
        problem = self._claim() if home else f"{self._node()} has no /dev/shm"
        target = home / f"step-{step:09d}" if home and not problem else None
        if not problem and target and target.exists():  # damaged, or of another history
            shutil.rmtree(target, ignore_errors=True)
        try:
            send(None, target, [source, *needy])
            if target is not None:
                verify(target)
        except (OSError, ValueError) as error:
            problem = str(error)
        return str(target or ""), problem

    def begin(
        self, learner: Learner, progress: Progress, warn: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        """What no life can use goes; whether all nodes have room for new ones."""
        self._warn, self._note = warn, note
        if self.plan.folder is None:
            return
        if self._writes and self._root is not None:
            for home in homes(self._root, self.run.key):
                for path in visible(home):
                    if step_of(path) > progress.step:  # a later life would take it for its own
                        shutil.rmtree(path, ignore_errors=True)
            remove_dead(self._root, self.run.key or "none")
        if not self.takes:
            return
        self._size = state_size(learner)
        problem = self._refusal() if self._writes else ""
        everyone = self.world.everyones((self._node(), problem))
        refused = [f"{node}: {why}" if self.world.num_processes > 1 else why
                   for node, why in everyone if why]  # fmt: skip
        self.takes = not refused
        if refused:
            self.in_words = f"none: {refused[0]}"
            return
        if self._writes and self._root is not None:
            self.writer = Writer(self._root, 1, self._written, "snapshot")
            if self.writer.problem:
                warn(self.writer.problem)
        often = f"every {self.steps} steps" if self.steps else (
            f"every {self.least:g} s or longer, at most 1 % of the time"
        )  # fmt: skip
        self.in_words = f"{megabytes(self._size)} in {self._root} of each node, {often}"
        self.world.stop.snapshot_every = None if self.steps else self.least

    def _refusal(self) -> str:
        """Why this node cannot hold snapshots; "" if it can."""
        if self._root is None:
            return (
                "this system has no /dev/shm; the checkpoints on the disk are what is gone on from"
            )
        own = sum(size_of(p) for home in homes(self._root, self.run.key) for p in visible(home))
        free = room(self._root) + own
        if free < ROOM * self._size:
            return (
                f"{self._root} and this job's memory have room for {megabytes(free)}, and three "
                f"times {megabytes(self._size)} are needed (more --mem; docker run --shm-size)"
            )
        return ""

    # --- while it trains

    def due(self, step: int) -> bool:
        """Whether one is to be taken after so many updates, the same on all processes."""
        if not self.takes:
            return False
        return step % self.steps == 0 if self.steps else self.world.stop.snapshot_agreed

    def take(self, learner: Learner, progress: Progress, began: float) -> None:
        """A copy to host memory now, the rest in the background; the step waits since `began`."""
        if not self._named:  # the first of this life
            self._named = True
            self.run = self.world.main_decides(lambda: run_of(Path(str(self.plan.folder))))
        self.world.stop.snapshotted()
        home = self._home()
        if not self._writes or self._gave_up or home is None:
            return
        assert self.writer is not None
        self.writer.folder = home
        if not self.steps and self.writer.busy():
            return  # a step waits for no copy that is still on its way
        self.writer.wait()
        if problem := self._claim():
            self._give_up(problem)
            return
        files = capture(
            learner.bare, learner.optimizer.optimizer, learner.averaged_model, learner.scaler
        )
        self._size = sum(t.nbytes for part in files.values() for t in part.values())
        self.world.stop.snapshot_every = None  # not due again before this one is whole
        self._paused = time.monotonic() - began
        life = len(self.run.lives) - 1
        self.writer.start(files, progress, {**self.facts, "life": life})

    def _home(self) -> Path | None:
        if self._root is None:
            return None
        node = os.environ.get("GROUP_RANK", "0")
        return self._root / f"lockstep-{os.geteuid()}-{self.run.key}-{node}"

    def _claim(self) -> str:
        """Make this node's folder, or take over that of the life before; why it cannot be had."""
        home = self._home()
        assert home is not None
        try:
            with contextlib.suppress(FileExistsError):
                home.mkdir(mode=0o700)
            if not is_ours(home):
                return f"{home} is somebody else's, or open to others"
            if read_owner(home) != self._owner:
                write_text(home / "owner", self._owner, sync=False)
        except OSError as error:
            return f"{home} cannot be written ({error.strerror})"
        return ""

    def _written(self, _: str) -> None:
        """From the writer's thread: what it cost says when the next one is due."""
        writer = self.writer
        assert writer is not None
        if writer.error:
            self._give_up(writer.error)
            return
        if not self._told and self._root is not None:  # what the life before left is needed no more
            for home in homes(self._root, self.run.key):
                old = is_dead(home) or read_owner(home) == self._owner  # under another number
                if home != writer.folder and old:
                    shutil.rmtree(home, ignore_errors=True)
        on_cpu = self.world.device.type == "cpu"  # there the writer takes time from the steps
        cost = self._paused + (writer.cpu_seconds if on_cpu else 0.0)
        every = max(self.least, SHARE * cost)
        if self.world.is_main and not self.steps:
            self.world.stop.snapshot_every = every
        if not self._told:
            self._told = True
            often = f"every {self.steps} steps" if self.steps else f"every {every:.3g} s"
            self._note(f"a snapshot of {megabytes(self._size)} takes {cost:.2g} s: one {often}")

    def _give_up(self, problem: str) -> None:
        """This node takes no more of them; the run goes on without."""
        if self._writes and not self.world.is_main:
            print(f"{self._node()}: {problem}", file=sys.stderr, flush=True)
        self._warn(problem)
        self.world.stop.snapshot_every = None
        self._gave_up = True

    # --- at the end

    def wait(self, seconds: float | None = None) -> None:
        """Until the one under way is whole."""
        if self.writer is not None:
            self.writer.wait(seconds)

    def end(self) -> None:
        """Wait for it, and take no more."""
        if self.writer is not None:
            self.writer.end()

    def forget(self) -> None:
        """The disk has it all: memory is given back."""
        self.wait()
        if self._writes and self._root is not None:
            for home in homes(self._root, self.run.key):
                shutil.rmtree(home, ignore_errors=True)


def read_owner(home: Path) -> str:
    """Who a folder belongs to; "" where nobody has written it yet."""
    try:
        return (home / "owner").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def state_size(learner: Learner) -> int:
    """Bytes of what a checkpoint holds, about."""
    tensors = list(whole_state(learner.bare).values())
    if learner.averaged_model is not None:
        tensors += whole_state(learner.averaged_model).values()
    optimizer = learner.optimizer.optimizer
    for p in learner.parameters:  # before the first update AdamW and its kin have no state yet
        state = optimizer.state.get(p)
        tensors += [p, p] if state is None else filter(torch.is_tensor, state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def send(path: Path | None, target: Path | None, ranks: list[int]) -> None:
    """Broadcast the files of a snapshot from the first of these ranks to the others.

    All processes of the run call it, with the same ranks: the group is made by all. Who has no
    `target`, or no room in it, hears it to the end and writes nothing.
    """
    limit = timedelta(seconds=wait_limit())
    group = cast(dist.ProcessGroup, dist.new_group(ranks, backend="gloo", timeout=limit))
    if dist.get_rank() not in ranks:
        return
    names = [[(p.name, p.stat().st_size) for p in sorted(path.iterdir())] if path else None]
    dist.broadcast_object_list(names, src=ranks[0], group=group)
    partial, failed = target and target.with_name(target.name + ".partial"), None
    with contextlib.ExitStack() as files:
        try:
            if partial:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
        except OSError as error:
            failed = error
        for name, size in names[0] or ():
            source = files.enter_context((path / name).open("rb")) if path else None
            for begin in range(0, size, PIECE):
                length = min(PIECE, size - begin)
                piece = torch.empty(length, dtype=torch.uint8)
                if source is not None:
                    piece = torch.frombuffer(bytearray(source.read(length)), dtype=torch.uint8)
                dist.broadcast(piece, src=ranks[0], group=group)
                try:
                    if partial and failed is None:
                        with (partial / Path(name).name).open("ab") as file:
                            file.write(piece.numpy().tobytes())
                except OSError as error:
                    failed = error
    dist.destroy_process_group(group)
    if failed is not None:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        raise failed
    if partial and target:
        partial.rename(target)
