"""A real SLURM of two or more nodes on this one host, in a folder of its own, for the tests.

Debian: apt-get install slurm-wlm munge. Runs as root. With apart=True each node is a network
namespace with its own address, so the nodes are separate hosts to each other.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sinfo", "srun", "sbatch", "scontrol", "scancel")
GRACE = 40  # seconds a preempted job of the partition `low` may go on
HOW = "apt-get install slurm-wlm munge, and run as root"


def why_not(apart: bool = False) -> str:
    """Why no SLURM can be started here; '' if one can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} here: {HOW}"
    if os.geteuid() != 0:
        return f"not root: {HOW}"
    if apart and not can_make_hosts():
        return "no network namespaces here (ip netns add)"
    return ""


def can_make_hosts() -> bool:
    name = f"ls{os.getpid()}probe"
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    return subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Hosts:
    """Two network namespaces joined by a bridge that this host is on too: hosts of their own."""

    def __init__(self):
        tag = os.getpid() % 10_000
        self.names = [f"ls{tag}a", f"ls{tag}b"]
        self.bridge = f"ls{tag}br"
        net = f"10.213.{tag % 250}"  # two sets of hosts may be there at once
        self.addresses = [f"{net}.1", f"{net}.2"]
        self.gateway = f"{net}.254"

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def start(self) -> None:
        self.ip("link", "add", self.bridge, "type", "bridge")
        self.ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        self.ip("link", "set", self.bridge, "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            self.ip("netns", "add", name)
            self.ip(
                "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth9", "netns", name
            )
            self.ip("link", "set", f"{name}v", "master", self.bridge, "up")
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth9")
            self.ip("-n", name, "link", "set", "eth9", "up")
            self.ip("-n", name, "link", "set", "lo", "up")

    def inside(self, number: int) -> list[str]:
        """Before a command: run it on that host. (`ip netns exec` would hide /sys/fs/cgroup.)"""
        return ["nsenter", f"--net=/run/netns/{self.names[number]}"]

    def stop(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)


class Cluster:
    """`with Cluster(folder) as slurm: slurm.run("sinfo")`."""

    def __init__(self, folder: Path, gpus: int = 0, apart: bool = False, nodes: int = 2):
        self.folder, self.gpus = folder, gpus
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.hosts = Hosts() if apart else None
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        }

    def __enter__(self) -> "Cluster":
        d = self.folder
        d.mkdir(parents=True, exist_ok=True)
        d.chmod(0o755)
        (d / "munge.key").write_bytes(os.urandom(1024))
        (d / "munge.key").chmod(0o600)
        if self.hosts:
            self.hosts.start()
        self.write_conf()
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def write_conf(self) -> None:
        d, host = self.folder, socket.gethostname().partition(".")[0]
        control, *ports = free_ports(1 + len(self.nodes))
        addresses = self.hosts.addresses if self.hosts else ["127.0.0.1"] * len(self.nodes)
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr={address} Port={port} "
            f"CPUs=2 RealMemory=4000 Feature=cpu,number{i}{gres}"
            for i, (address, port) in enumerate(zip(addresses, ports, strict=True), 1)
        )
        controller = self.hosts.gateway if self.hosts else "127.0.0.1"
        (d / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}({controller})
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge.socket
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
OverTimeLimit=1
{"GresTypes=gpu" if self.gpus else ""}
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes={",".join(self.nodes)} MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=debug Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low PriorityTier=1 GraceTime={GRACE}
PartitionName=lowest PriorityTier=1 GraceTime=0
""")
        if self.gpus:  # declared, not there: what SLURM hands out, not what CUDA sees
            lines = "".join(f"Name=gpu File={d}/gpu{i}\n" for i in range(self.gpus))
            for i in range(self.gpus):
                (d / f"gpu{i}").touch()
            (d / "gres.conf").write_text(lines)
        (d / "state").mkdir(exist_ok=True)

    def start(self) -> None:
        d = self.folder
        munge = [f"--socket={d}/munge.socket", f"--key-file={d}/munge.key", "--force"]
        files = {"pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        self.daemon(["munged", *munge, *(f"--{k}={d}/{v}" for k, v in files.items())])
        self.daemon(["slurmctld", "-c"])
        time.sleep(2)
        for i, name in enumerate(self.nodes):
            inside = self.hosts.inside(i) if self.hosts else []
            self.daemon([*inside, "slurmd", "-N", name])
        deadline = time.monotonic() + 30
        while self.run("sinfo", "-h", "-o", "%D %t").strip() != f"{len(self.nodes)} idle":
            if time.monotonic() > deadline:
                raise RuntimeError("SLURM does not come up:\n" + self.logs())
            time.sleep(0.3)

    def daemon(self, command: list[str]) -> None:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}\n{self.logs()}")

    def logs(self) -> str:
        parts = [f"{p.name}:\n{p.read_text()[-2000:]}" for p in self.folder.glob("*.log")]
        return "\n".join(parts)

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--full", "--signal=KILL", "--state=running")
            time.sleep(0.5)
        pids = []
        for name in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                pids.append(int((self.folder / f"{name}.pid").read_text()))
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 5
            while any(Path(f"/proc/{pid}").exists() for pid in pids):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        if self.hosts:
            self.hosts.stop()

    # --- what tests do with it ------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, **more) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600,
            env={**self.env, **more.pop("env", {})}, **more,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ...; of an array's one task: `7_1`."""
        shown = self.run("scontrol", "show", "job", job, check=False)
        return shown.partition("JobState=")[2].split()[0] if "JobState=" in shown else "GONE"

    def wait(self, job: str, *states: str, seconds: float = 600) -> str:
        """Wait for one of these states (default: an end)."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + seconds
        while (now := self.state(job)) not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {now}, not {' or '.join(wanted)}\n{self.logs()}")
            time.sleep(0.3)
        return now

    def lose(self, node: str) -> None:
        """As a node whose power fails: its daemon and all that it started, without a word."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        conf = f"SLURM_CONF={self.env['SLURM_CONF']}"
        marks = {f"SLURMD_NODENAME={node}".encode(), conf.encode()}
        tasks, keepers = set(), set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks <= {*(path / "environ").read_bytes().split(b"\0")}:
                    tasks.add(int(path.name))
                    parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                    if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
                        keepers.add(int(parent))
        for pid in (*keepers, *tasks):  # first who would tell how the others ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def bring_back(self, node: str) -> None:
        """Its daemon starts again; a node that was DOWN is taken in."""
        self.daemon(["slurmd", "-N", node])
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-o", "%D %t").strip() != f"{len(self.nodes)} idle":
            if time.monotonic() > deadline:
                raise RuntimeError(f"{node} does not come back:\n{self.logs()}")
            time.sleep(0.3)

    def has_steps(self, job: str) -> bool:
        """Whether a process of SLURM's still looks after a step of this job."""
        wanted = f"slurmstepd: [{job}.".encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes().startswith(wanted):
                    return True
        return False

    def start_now(self, job: str) -> None:
        """Spare a requeued job its two minutes of waiting."""
        # A start in the very second of the requeue is refused: "Job credential revoked"; and what
        # still ends of the last life, on a node that was lost, would end the next one's step too.
        time.sleep(4)
        deadline = time.monotonic() + 60
        while self.has_steps(job) and time.monotonic() < deadline:
            time.sleep(0.3)
        with contextlib.suppress(RuntimeError):
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
