"""Rounds of chaos: small trainings that are killed, stopped, slowed and starved until they end.

Each round is a run of its own on 2 to 4 processes, under one agent or two. While it trains, chance
kills a rank or an agent (kill -9), stops the launch (SIGTERM), freezes a rank for some seconds,
fills the run folder's disk or takes a rank's memory away; between lives it damages the newest
checkpoint, and may go on on another number of processes. The run's last checkpoint must equal that
of the undisturbed run on as many processes, bit for bit, and within 1e-5 where a life had another
number; no row may be missing or there twice. Linux; the small disk needs root.
"""

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

from bench.kills import running, trains
from bench.many_photographs import rows
from bench.measure import REPOSITORY, arguments_of, finish, shown, spread, table
from common.disk import read_json
from distributed.checkpoint import visible

NET = """
import os
import time

from torch import nn


class Net(nn.Module):
    '''Slow enough to be met in mid-step; says on how many processes it trained.

    Rounding must not grow in it, or nothing could be said of another number of processes: no kink,
    and no bias before a norm, whose gradient is rounding alone and by Adam as large as any other.
    '''

    def __init__(self, num_classes=10):
        super().__init__()
        self.calls = 0
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.GELU(),
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, num_classes))

    def forward(self, x):
        if self.training:
            time.sleep(0.004)
            self.calls += 1
            if self.calls == 20:
                with open("worlds.txt", "a") as file:
                    print(os.environ.get("WORLD_SIZE", "1"), file=file)
        return self.head(self.body(x).mean((2, 3)))
"""
STEPS, LOG_EVERY = 200, 5
FLAGS = f"""
--model net.py:Net --dataset digits --image-size 16 --batch-size 96 --shards 12 --threads 1
--augment crop --ema 0.9 --lr 0.0005 --max-steps {STEPS} --log-every {LOG_EVERY} --no-plots
--checkpoint-every 20 --snapshot-every 5
"""
WAYS = ((2, 1), (3, 1), (4, 1), (2, 2), (4, 2))  # processes, agents that they are spread over
TOLERANCE = 1e-5
MOST_LIVES = 15
RESTARTS = 3  # by an agent, in place
PATIENCE = 600.0  # seconds for a life, which takes a minute on a busy machine
SLOW = 150.0  # a life that waited for something: worth a look
DISK = 24_000_000  # bytes of the run folder's disk


@dataclass
class Round:
    """One run, its folder and what was done to it."""

    number: int
    folder: Path
    chance: random.Random
    small_disk: bool
    done: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each life

    @property
    def lives(self) -> int:
        return len(self.seconds)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def trained(self) -> int:
        """Of how many processes, in all lives, it is known that they trained."""
        path = self.folder / "worlds.txt"
        return path.read_text().count("\n") if path.exists() else 0

    def status(self) -> str:
        """What the run says of itself."""
        return read_json(self.run / "status.json", {}).get("status", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder: Path, way: tuple[int, int], name: str) -> list[subprocess.Popen]:
    """The agents of one life, under launch/torchrun.sh, or two of torchrun's on this one host."""
    processes, agents = way
    flags = [*shlex.split(FLAGS), "--run-dir", "run"]
    env = os.environ | {
        "LOCKSTEP_PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "LOCKSTEP_SHM": str(folder.parent / "memory"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    if agents == 1:
        words = ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), "--nproc", str(processes)]
        commands = [[*words, "--id", name, "--max-restarts", str(RESTARTS), "--", *flags]]
    else:  # as launch/torchrun.sh does on hosts of their own: here both would be the head
        signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
        limits = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3"
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", f"1:{agents}"]
        words += ["--nproc-per-node", str(processes // agents), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", name]
        words += ["--max-restarts", str(RESTARTS), "--signals-to-handle", signals]
        commands = [
            [*words, "--rdzv-conf", f"is_host={int(number == 0)},{limits}",
             "--local-addr", "127.0.0.1", str(REPOSITORY / "train.py"), *flags]
            for number in range(agents)
        ]  # fmt: skip
    with (folder / "log").open("a") as file:
        return [
            subprocess.Popen(
                words, cwd=folder, env=env, stdout=file, stderr=file, start_new_session=True
            )
            for words in commands
        ]


def ranks(agents: list[subprocess.Popen]) -> list[psutil.Process]:
    """The processes that train below these agents."""
    found = []
    for agent in agents:
        with contextlib.suppress(psutil.Error):
            found += psutil.Process(agent.pid).children(recursive=True)
    there = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            if trains(process):
                there.append(process)
    return there


def disturb(one: Round, agents: list[subprocess.Popen]) -> str:
    """Do something to a life that is under way; in words, "" where there was nobody to do it to."""
    chance, there = one.chance, ranks(agents)
    kinds = ["kill a rank", "kill an agent", "stop", "freeze", "less memory"]
    kind = chance.choice(kinds + ["full disk"] * one.small_disk)
    rank = chance.choice(there) if there else None
    if not (agents if kind in ("kill an agent", "stop") else there):
        return ""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if kind == "kill an agent":
            chance.choice(agents).kill()
        elif kind == "stop":
            for agent in agents:
                agent.terminate()
        elif kind == "full disk":
            fill(one.run.resolve(), chance.uniform(0.5, 3.0))
        elif rank is not None and kind == "kill a rank":
            rank.kill()
        elif rank is not None and kind == "freeze":
            rank.suspend()
            time.sleep(chance.uniform(0.5, 6.0))
            rank.resume()
        elif rank is not None:
            starve(rank, chance.uniform(0.5, 3.0))
    return kind


def fill(folder: Path, seconds: float) -> None:
    """Leave no byte free on the disk of a folder, for some time."""
    path = folder / "filled"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65_536))
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    time.sleep(seconds)
    path.unlink(missing_ok=True)


def starve(rank: psutil.Process, seconds: float) -> None:
    """Let a process have no more memory than it has, for some time."""
    _, most = rank.rlimit(psutil.RLIMIT_AS)
    rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms, most))
    time.sleep(seconds)
    rank.rlimit(psutil.RLIMIT_AS, (most, most))


def damage(one: Round) -> str:
    """Between two lives: truncate a file of the newest checkpoint, or flip a bit of it."""
    found = visible(one.run / "checkpoints")
    if len(found) < 2:  # what remains must suffice
        return ""
    files = [path for path in found[0].iterdir() if path.stat().st_size > 64]
    if not files:  # it was truncated before
        return ""
    path = one.chance.choice(files)
    content = bytearray(path.read_bytes())
    if one.chance.random() < 0.5:
        path.write_bytes(content[: one.chance.randrange(len(content))])
        return "truncate a checkpoint"
    content[one.chance.randrange(len(content))] ^= 1 << one.chance.randrange(8)
    path.write_bytes(content)
    return "flip a bit of a checkpoint"


def live(one: Round, way: tuple[int, int], disturbances: int) -> None:
    """One life from its launch to the end of its last process. SystemExit if it does not end."""
    agents = launch(one.folder, way, f"chaos-{one.number}-{one.lives}")
    known: set[int] = set()
    launched = time.monotonic()
    until = launched + PATIENCE
    early = one.chance.random() < 0.3  # while it starts, where most of a short life passes
    at = sorted(one.chance.uniform(0.2, 12.0 if early else 6.0) for _ in range(disturbances))
    begun, before = time.monotonic() if early else 0.0, one.trained()
    try:
        while any(agent.poll() is None for agent in agents) or any(map(running, known)):
            known |= {process.pid for process in ranks(agents)}
            if not begun and one.trained() > before:
                begun = time.monotonic()
            if at and begun and time.monotonic() > begun + at[0]:
                at.pop(0)
                if kind := disturb(one, [agent for agent in agents if agent.poll() is None]):
                    one.done.append(kind)
            if time.monotonic() > until:
                printed = one.log.read_text(errors="replace")[-4000:]
                raise SystemExit(f"round {one.number} does not end: {one.done}\n{printed}")
            time.sleep(0.1)
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
        for pid in known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    one.seconds.append(time.monotonic() - launched)


def last_state(run: Path) -> dict:
    """The tensors of the newest checkpoint, by file and name."""
    newest = visible(run / "checkpoints")[0]
    return {
        f"{path.name}: {name}": tensor
        for path in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def wrong_with(one: Round, whole: Path, same_bits: bool) -> list[str]:
    """What differs from the undisturbed run."""
    mine, other = last_state(one.run), last_state(whole)
    if mine.keys() != other.keys():
        return [f"other tensors: {sorted(mine.keys() ^ other.keys())[:3]}"]
    wrong = [
        name
        for name, tensor in mine.items()
        if not (
            tensor.equal(other[name])
            if same_bits
            else (tensor.double() - other[name].double()).abs().max() <= TOLERANCE
        )
    ]
    there, due = (
        [row["step"] for row in rows(run) if "train/loss" in row] for run in (one.run, whole)
    )
    return wrong + ([] if there == due else [f"rows of steps {there} instead of {due}"])


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of few bytes at a folder, where this may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    there = (
        shutil.which("mount") is not None
        and not subprocess.run(mount, capture_output=True).returncode
    )
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def one_round(number: int, arguments: argparse.Namespace, top: Path) -> tuple[Round, list[str]]:
    """A run of its own until it says that it is finished; what is wrong with it then."""
    chance = random.Random(f"{arguments.seed} {number}")
    folder, disk = top / f"round-{number}", top / f"disk-{number}"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    with small_disk(disk) as there:
        (folder / "run").symlink_to(disk)
        one = Round(number, folder, chance, there)
        way = chance.choice(WAYS)
        while one.status() != "finished":
            if one.lives == MOST_LIVES:
                return one, [f"not finished after {MOST_LIVES} lives"]
            calm = one.lives > MOST_LIVES // 2  # it must end at last
            live(one, way, 0 if calm else chance.randint(1, 3))
            if one.status() != "finished" and chance.random() < 0.25:
                one.done += filter(None, [damage(one)])
            if chance.random() < 0.5:
                way = chance.choice([other for other in WAYS if other[0] != way[0]])
        worlds = set(map(int, (folder / "worlds.txt").read_text().split()))
        size = worlds.pop()
        found = wrong_with(one, top / f"whole-{size}" / "run", same_bits=not worlds)
        one.done.append("bits" if not worlds else "other processes")
    return one, found


def markdown(results: dict) -> str:
    """What was done, how often, and what came of it."""
    counted = sorted(results["done"].items(), key=lambda item: -item[1])
    lines = [[kind, str(count)] for kind, count in counted]
    if "seconds of a life" in results:  # not in records of old
        lines.append(["seconds of a life, median (range)", shown(results["seconds of a life"])])
    return table([f"in {results['rounds']} rounds, {results['lives']} lives", "times"], lines)


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="ROUND", help="of them these alone")
    parser.add_argument(
        "--keep", action="store_true", help="the folders of rounds that failed, or had a slow life"
    )
    arguments = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix="lockstep-chaos-"))
    (top / "memory").mkdir()
    done: Counter[str] = Counter()
    lives: list[float] = []
    kept, failed = [], []
    try:
        for processes in sorted({processes for processes, _ in WAYS} | {1}):
            folder = top / f"whole-{processes}"
            folder.mkdir()
            (folder / "net.py").write_text(NET)
            whole = Round(-processes, folder, random.Random(0), False)
            live(whole, (processes, 1), 0)
            if whole.status() != "finished":
                raise SystemExit(f"undisturbed:\n{whole.log.read_text()[-3000:]}")
        numbers = arguments.only or range(arguments.rounds)
        for number in numbers:
            one, wrong = one_round(number, arguments, top)
            done.update(one.done)
            lives += one.seconds
            verdict = f"WRONG: {'; '.join(wrong[:5])}" if wrong else "equal"
            cost = " + ".join(f"{seconds:.0f}" for seconds in one.seconds)
            print(
                f"round {number}, lives of {cost} s: {', '.join(one.done)}: {verdict}", flush=True
            )
            if wrong:
                failed.append(number)
            if arguments.keep and (wrong or max(one.seconds) > SLOW):
                kept.append(one.folder)
            else:
                shutil.rmtree(one.folder, ignore_errors=True)
        results = {
            "rounds": len(numbers), "lives": len(lives), "done": dict(done), "failed": failed,
            "seconds of a life": spread(lives),
        }  # fmt: skip
        print(markdown(results), f"{len(failed)} rounds failed", sep="\n\n")
        finish(arguments, results)
        return int(bool(failed))
    finally:
        if kept:
            print("kept:", *kept)
        else:
            shutil.rmtree(top, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
