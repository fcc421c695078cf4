"""Submits a training job to SLURM, after checking its flags: all that needs no data and no node.

python launch/submit.py --nodes 2 --gpus 8 --time 4h -- --model vgg16 --dataset cifar10
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from sweep import read_rows

HERE = Path(__file__).resolve().parent.parent
LEAD_SECONDS = 180  # of --signal in slurm.sbatch: the job saves that long before its limit
LEAD = re.compile(r"--signal=B:USR1@([1-9][0-9]{0,5})")  # another lead: the only such flag allowed
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+,-]*")
ARRAY = re.compile(r"[0-9]+(-[0-9]+(:[1-9][0-9]*)?)?(,[0-9]+(-[0-9]+)?)*(%[1-9][0-9]*)?")
WAITING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"}
OWNED = (
    "--export",
    "--wrap",
    "--signal",
    "--requeue",
    "--no-requeue",
    "--open-mode",
    "--chdir",
    "--parsable",
)


class Problem(ValueError):
    """Something the user can mend; printed as one sentence, exit status 2."""


def seconds(text: str, lead: int = LEAD_SECONDS) -> int:
    """`4h`, `3h50m`, `1d`, `240` (minutes), `4:00:00` or `1-12:00:00` as seconds."""
    if re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) and text:
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        total = sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([dhms])", text))
    elif found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        total = days * 86400 + hours * 3600 + minutes * 60 + rest
    else:
        total = 60 * int(text) if text.isdecimal() else 0
    if total <= lead:
        raise Problem(
            f"--time {text}: write 4h, 3h50m, 240 (minutes) or 1-12:00:00, and more than the "
            f"{lead} s the job keeps to save in"
        )
    return total


def lead_of(options: argparse.Namespace) -> int:
    """Seconds before its limit at which the job is told to save."""
    found = [LEAD.fullmatch(flag) for flag in options.sbatch]
    return next((int(match[1]) for match in found if match), LEAD_SECONDS)


def slurm_time(total: int) -> str:
    minutes = -(-total // 60)  # SLURM counts minutes
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False,
        epilog="What follows -- are train.py's flags: python train.py --help",
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs per node: one process each")
    parser.add_argument("--tasks", type=int, default=1, help="processes per node without GPUs")
    parser.add_argument("--cpus", type=int, help="CPUs per process")
    parser.add_argument("--time", help="time limit: 4h, 3h50m, 1-12:00:00")
    parser.add_argument("--mem", help="memory per node: 64G")
    parser.add_argument("--name", default="lockstep")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--constraint", help="as sbatch wants it: 'a100|h100'")
    parser.add_argument("--array", help="0-4: five seeds, or five rows of --sweep")
    parser.add_argument("--sweep", help="file with one line of further flags per array task")
    parser.add_argument("--env", help="file the job sources first (module load, activate)")
    parser.add_argument("--python", help="the Python of the training environment")
    parser.add_argument("--preflight", action="store_true", help="check the nodes before training")
    parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG", help="a further "
                        "flag of sbatch, as --sbatch=--exclusive; may be repeated")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")
    parser.add_argument("--follow", action="store_true", help="show the log until the job ends")
    return parser


def check(options: argparse.Namespace) -> None:
    """Every value that sbatch would take wrongly, or not at all."""
    problems = []
    for name in ("nodes", "tasks", "cpus"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
    if options.gpus < 0:
        problems.append(f"--gpus {options.gpus}: must be at least 0")
    if options.gpus and options.tasks not in (1, options.gpus):
        problems.append(f"--tasks {options.tasks}: with --gpus there is one process per GPU")
    for name in ("name", "partition", "account", "qos", "mem"):
        value = getattr(options, name)
        if value is not None and not NAME.fullmatch(value):
            problems.append(f"--{name} {value!r}: use letters, digits and . _ @ + , -")
    if options.constraint and not re.fullmatch(r"[\w.,&|*()\[\]:-]+", options.constraint, re.ASCII):
        problems.append(
            f"--constraint {options.constraint!r}: use letters, digits and . , & | * ( )"
        )
    if options.array and not ARRAY.fullmatch(options.array):
        problems.append(f"--array {options.array!r}: write 0-4, 0,2,5 or 0-9%2")
    if options.follow and (options.array or options.sweep):
        problems.append("--follow shows one log: follow an array's task with tail -F")
    for name in ("sweep", "env"):
        value = getattr(options, name)
        if value and not Path(value).is_file():
            problems.append(f"--{name} {value}: no such file")
    for flag in options.sbatch:
        if not flag.startswith("--") or any(c < " " for c in flag):
            problems.append(f"--sbatch {flag!r}: one flag of sbatch, as --sbatch=--exclusive")
        elif flag.partition("=")[0] in OWNED and not LEAD.fullmatch(flag):
            lead = "; to save earlier: --sbatch=--signal=B:USR1@600" if "signal" in flag else ""
            problems.append(f"--sbatch {flag}: launch/slurm.sbatch needs its own{lead}")
    if problems:
        raise Problem("\n".join(problems))


def trainer_settings(arguments: list[str], python: str) -> dict[str, tuple[str, str]]:
    """name -> (value, origin) as `python -m config` resolves the flags; its errors are ours."""
    if any("\0" in word or "\n" in word or "\r" in word for word in arguments):
        raise Problem("a line break in train.py's flags: SLURM's tools do not all keep it; drop it")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    command = [python, "-m", "config", "--json", *arguments]
    try:
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    except OSError as error:
        raise Problem(f"--python {python}: {error.strerror}") from None
    if done.returncode:
        raise Problem(done.stderr.strip() or f"{shlex.join(command)} failed")
    resolved = json.loads(done.stdout)
    return {name: (str(v), resolved["origins"][name]) for name, v in resolved["config"].items()}


def check_settings(settings: dict, options: argparse.Namespace) -> None:
    """What only a job makes wrong: data or weights left to chance, a batch that does not divide."""
    if settings["dataset"][0] == "auto":
        raise Problem("name the data set, e.g. --dataset cifar10: a job does not take what it "
                      "happens to reach")  # fmt: skip
    if settings["model"][0] == "alexnet" and settings["weights"][0] == "auto":
        raise Problem("name alexnet's start, --weights none or --weights imagenet: a job does not "
                      "take what it happens to reach")  # fmt: skip
    if options.array and not options.sweep and settings["seed"][1] == "flag":
        raise Problem("--seed with --array would train the same run in every task: drop it (the "
                      "task's number is the seed), or use --sweep")  # fmt: skip
    batch, origin = settings["batch_size"]
    parts = processes(options) * int(settings["accumulate"][0])
    if (
        (origin == "flag" or origin.startswith("file"))
        and settings["shards"][0] == "auto"
        and int(batch) % parts
    ):
        low = int(batch) // parts * parts
        near = f"{low} and {low + parts} do" if low else f"{parts} does"
        raise Problem(f"--batch-size {batch} does not divide over {processes(options)} processes "
                      f"x --accumulate {settings['accumulate'][0]}; {near}")  # fmt: skip


def tasks_of(array: str) -> list[int]:
    """`0-9:3,12%2` as the numbers of its tasks."""
    numbers = []
    for part in array.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def check_array(options: argparse.Namespace, arguments: list[str], python: str) -> dict:
    """The settings of an array's first task, after the flags of each task were resolved."""
    for word in arguments:
        flag = word.replace("_", "-").partition("=")[0]
        if flag in ("--run-dir", "--resume"):
            raise Problem(f"{flag} with --array would give every task the same folder: drop it, "
                          "each task gets its own")  # fmt: skip
    if not options.sweep:
        settings = trainer_settings(arguments, python)
        check_settings(settings, options)
        return settings
    try:
        rows = read_rows(Path(options.sweep))
    except (OSError, ValueError) as error:
        raise Problem(f"--sweep: {error}") from None
    if not rows:
        raise Problem(f"--sweep {options.sweep}: holds no row")
    options.array = options.array or f"0-{len(rows) - 1}"
    beyond = [task for task in tasks_of(options.array) if task >= len(rows)]
    if beyond:
        raise Problem(f"--array {options.array}: {options.sweep} has rows 0 to {len(rows) - 1}, "
                      f"none for task {beyond[0]}")  # fmt: skip
    first: dict = {}
    folders: dict[str, int] = {}
    for task in tasks_of(options.array):
        try:
            settings = trainer_settings([*arguments, *rows[task]], python)
            check_settings(settings, options)
        except Problem as problem:
            raise Problem(f"{options.sweep}, row {task}: {problem}") from None
        folder = settings.get("run_dir", ("None", ""))[0]
        if folder != "None":
            folder = str((HERE / folder).resolve())
            if folder in folders:
                raise Problem(
                    f"{options.sweep}, rows {folders[folder]} and {task} would train in one "
                    f"folder, {folder}; give each its own --run-dir, or none"
                )
            folders[folder] = task
        first = first or settings
    return first


def processes(options: argparse.Namespace) -> int:
    return options.nodes * (options.gpus or options.tasks)


def warn_of_time(settings: dict, options: argparse.Namespace, runs: Path) -> str:
    """Whether an earlier run of the same kind says that the time limit is too short; '' if not."""
    if not options.time:
        return ""
    limit = seconds(options.time, lead_of(options)) - lead_of(options)
    like = {name: settings[name][0] for name in ("model", "dataset", "image_size")}
    summaries = sorted(runs.glob("*/summary.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in summaries:
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))["config"]
            if any(str(config[name]) != value for name, value in like.items()):
                continue
            need = summary["seconds"] / summary["epoch"] * float(settings["epochs"][0])
            if settings["max_steps"][0] != "None":
                need = min(
                    need, summary["seconds"] / summary["step"] * int(settings["max_steps"][0])
                )
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            continue
        if need > limit:
            return (
                f"warning: at the speed of {path.parent} (which may have had other devices), "
                f"this run takes about {need / 3600:.1f} h, more than --time "
                f"{options.time}; the job will save and requeue itself about "
                f"{int(need // limit)} times"
            )
        return ""
    return ""


def sbatch_command(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    log = "runs/slurm-%A_%a.log" if options.array else "runs/slurm-%j.log"
    command = ["sbatch", "--parsable", f"--job-name={options.name}", f"--nodes={options.nodes}"]
    command += [f"--ntasks-per-node={options.gpus or options.tasks}", f"--output={log}"]
    command.append("--export=ALL")  # some sites set SBATCH_EXPORT=NONE: no Python would be found
    if options.gpus:
        command.append(f"--gpus-per-node={options.gpus}")
    if options.cpus:
        command.append(f"--cpus-per-task={options.cpus}")
    if options.time:
        command.append(f"--time={slurm_time(seconds(options.time, lead_of(options)))}")
    for name in ("mem", "partition", "account", "qos", "constraint", "array"):
        if getattr(options, name):
            command.append(f"--{name}={getattr(options, name)}")
    return [*command, *options.sbatch, "launch/slurm.sbatch", *arguments]


def job_environment(options: argparse.Namespace) -> dict[str, str]:
    """What slurm.sbatch reads from the environment, which sbatch carries along."""
    given = {
        "LOCKSTEP_ENV": options.env and str(Path(options.env).resolve()),
        "LOCKSTEP_SWEEP": options.sweep and str(Path(options.sweep).resolve()),
        "LOCKSTEP_PYTHON": options.python or ("" if options.env else sys.executable),
        "LOCKSTEP_PREFLIGHT": "1" if options.preflight else "",
    }
    return {name: value for name, value in given.items() if value}


def without(own: list[str], names: tuple[str, ...] = ("--array", "--sweep")) -> list[str]:
    """submit.py's own words without these options and their values: one task goes on alone."""
    kept, skip = [], False
    for word in own:
        if not skip and word.partition("=")[0] not in names:
            kept.append(word)
        skip = not skip and word in names
    return kept


def follow(job: str, log: Path, run: Path) -> int:
    """Print the log as it grows, until the job has ended: 0 if it did so well. Ctrl-C leaves it.

    SLURM forgets a job minutes after its end: then the run's own status decides.
    """
    shown = 0
    while True:
        asked = ["squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T"]
        queue = subprocess.run(asked, capture_output=True, text=True)
        states = set(queue.stdout.split())
        silent = queue.returncode and "Invalid job id" not in queue.stderr  # a busy controller
        over = not silent and not states & WAITING
        if log.is_file():
            with log.open("rb") as file:
                file.seek(shown)
                new = file.read()
            shown += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        if over:
            if states:
                print(f"job {job}: {', '.join(sorted(states))}")
                return 0 if states == {"COMPLETED"} else 1
            try:
                status = json.loads((run / "status.json").read_text(encoding="utf-8"))["status"]
            except (OSError, ValueError, KeyError, TypeError):
                status = "no status"
            print(f"job {job}: has left the queue; {run / 'status.json'} says: {status}")
            return 0 if status == "finished" else 1
        time.sleep(2)


def submit(argv: list[str]) -> int:
    if "--" in argv:
        cut = argv.index("--")
        own, arguments = argv[:cut], argv[cut + 1 :]
    else:
        own, arguments = argv, []
    options = build_parser().parse_args(own)
    if not arguments:
        raise Problem("train.py's flags are missing: submit.py --nodes 1 --gpus 8 -- --model "
                      "resnet18 --dataset cifar10")  # fmt: skip
    check(options)
    python = options.python or sys.executable
    if options.array or options.sweep:
        settings = check_array(options, arguments, python)
    else:
        settings = trainer_settings(arguments, python)
        check_settings(settings, options)
    command, env = sbatch_command(options, arguments), job_environment(options)
    warning = warn_of_time(settings, options, HERE / "runs")
    if warning:
        print(warning, file=sys.stderr)
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    print(f"{variables} {shlex.join(command)}".strip(), flush=True)
    if options.dry_run:
        return 0
    (HERE / "runs").mkdir(exist_ok=True)
    try:
        done = subprocess.run(
            command, cwd=HERE, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        raise Problem("sbatch is not here: submit from a login node of the cluster") from None
    if done.returncode:
        return 1
    job = done.stdout.strip().partition(";")[0]
    log = f"runs/slurm-{job}_<task>.log" if options.array else f"runs/slurm-{job}.log"
    own_folder = settings.get("run_dir", ("None", ""))[0]
    run = own_folder if own_folder != "None" else log.removesuffix(".log")
    again = shlex.join(["python", "launch/submit.py", *without(own), "--", "--resume", run])
    print(f"job     {job}")
    print(f"log     {log}")
    print(f"follow  tail -F {shlex.quote(log)}     squeue --jobs {job}")
    print(f"stop    scancel {job}     saves, and does not requeue")
    print(f"go on   {again}", flush=True)
    if options.follow:
        try:
            return follow(job, HERE / log, HERE / run)
        except KeyboardInterrupt:
            print(f"\nthe job runs on; scancel {job} stops it")
    return 0


def main(argv: list[str]) -> int:
    try:
        return submit(argv)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
