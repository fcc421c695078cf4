"""Submits a training job to SLURM, after checking all that can be checked before it queues.

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

HERE = Path(__file__).resolve().parent.parent
LEAD_SECONDS = 180  # of --signal in slurm.sbatch: the job saves that long before its limit
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+,-]*")
OWNED = ("--wrap", "--signal", "--requeue", "--no-requeue", "--open-mode", "--chdir", "--parsable")


class Problem(ValueError):
    """Something the user can mend; printed as one sentence, exit status 2."""


def seconds(text: str) -> int:
    """`4h`, `3h50m`, `1d`, `240` (minutes), `4:00:00` or `1-12:00:00` as seconds."""
    if re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) and text:
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        total = sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([dhms])", text))
    elif found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        total = days * 86400 + hours * 3600 + minutes * 60 + rest
    else:
        total = 60 * int(text) if text.isdecimal() else 0
    if total <= LEAD_SECONDS:
        raise Problem(
            f"--time {text}: write 4h, 3h50m, 240 (minutes) or 1-12:00:00, and more than the "
            f"{LEAD_SECONDS} s the job keeps to save in"
        )
    return total


def slurm_time(total: int) -> str:
    minutes = -(-total // 60)  # SLURM counts minutes
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__.splitlines()[0], allow_abbrev=False,
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
    parser.add_argument("--array", help="0-4: five seeds, or five lines of --sweep")
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
    if options.array and not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+)?)*(%\d+)?", options.array):
        problems.append(f"--array {options.array!r}: write 0-4, 0,2,5 or 0-9%2")
    if options.sweep and not options.array:
        problems.append("--sweep needs --array, e.g. --array 0-4 for five lines")
    for name in ("sweep", "env"):
        value = getattr(options, name)
        if value and not Path(value).is_file():
            problems.append(f"--{name} {value}: no such file")
    for flag in options.sbatch:
        if not flag.startswith("--") or any(c < " " for c in flag):
            problems.append(f"--sbatch {flag!r}: one flag of sbatch, as --sbatch=--exclusive")
        elif flag.partition("=")[0] in OWNED:
            problems.append(f"--sbatch {flag}: launch/slurm.sbatch needs its own {flag}")
    if problems:
        raise Problem("\n".join(problems))


def trainer_settings(arguments: list[str], python: str) -> dict[str, tuple[str, str]]:
    """name -> (value, origin) as `python -m config` resolves the flags; its errors are ours."""
    if any("\0" in word or "\n" in word or "\r" in word for word in arguments):
        raise Problem("a line break in train.py's flags: SLURM's tools do not all keep it; drop it")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    command = [python, "-m", "config", *arguments]
    try:
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    except OSError as error:
        raise Problem(f"--python {python}: {error.strerror}") from None
    if done.returncode:
        raise Problem(done.stderr.strip() or f"{shlex.join(command)} failed")
    settings = {}
    for line in done.stdout.splitlines():
        found = re.fullmatch(r"(\w+) +(.*?) +(flag|saved run|recipe|default|--debug|file .*)", line)
        if found:
            settings[found[1]] = (found[2], found[3])
    return settings


def check_settings(settings: dict, options: argparse.Namespace) -> None:
    """What only the allocation makes wrong: data left to chance, a batch that does not divide."""
    if settings["dataset"][0] == "auto":
        raise Problem("name the data set, e.g. --dataset cifar10: a job does not take what it "
                      "happens to reach")  # fmt: skip
    if options.array and not options.sweep and settings["seed"][1] == "flag":
        raise Problem("--seed with --array would train the same run in every task: drop it (the "
                      "task's number is the seed), or use --sweep")  # fmt: skip
    batch, origin = settings["batch_size"]
    parts = processes(options) * int(settings["accumulate"][0])
    if origin == "flag" and settings["shards"][0] == "auto" and int(batch) % parts:
        low = int(batch) // parts * parts
        near = f"{low} and {low + parts} do" if low else f"{parts} does"
        raise Problem(f"--batch-size {batch} does not divide over {processes(options)} processes "
                      f"x --accumulate {settings['accumulate'][0]}; {near}")  # fmt: skip


def processes(options: argparse.Namespace) -> int:
    return options.nodes * (options.gpus or options.tasks)


def warn_of_time(settings: dict, options: argparse.Namespace, runs: Path) -> str:
    """Whether an earlier run of the same kind says that the time limit is too short; '' if not."""
    if not options.time:
        return ""
    limit = seconds(options.time) - LEAD_SECONDS
    like = {name: settings[name][0] for name in ("model", "dataset", "image_size")}
    summaries = sorted(runs.glob("*/summary.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in summaries:
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))["config"]
            if any(str(config[name]) != value for name, value in like.items()):
                continue
            need = summary["seconds"] / summary["epoch"] * float(settings["epochs"][0])
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            continue
        if need > limit:
            return (
                f"warning: at the speed of {path.parent} (which may have had other devices), "
                f"{settings['epochs'][0]} epochs take about {need / 3600:.1f} h, more than --time "
                f"{options.time}; the job will save and requeue itself about "
                f"{int(need // limit)} times"
            )
        return ""
    return ""


def sbatch_command(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    log = "runs/slurm-%A_%a.log" if options.array else "runs/slurm-%j.log"
    command = ["sbatch", "--parsable", f"--job-name={options.name}", f"--nodes={options.nodes}"]
    command += [f"--ntasks-per-node={options.gpus or options.tasks}", f"--output={log}"]
    if options.gpus:
        command.append(f"--gpus-per-node={options.gpus}")
    if options.cpus:
        command.append(f"--cpus-per-task={options.cpus}")
    if options.time:
        command.append(f"--time={slurm_time(seconds(options.time))}")
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


def follow(job: str, log: Path) -> None:
    """Print the log as it grows, until the job has left the queue; Ctrl-C leaves the job alone."""
    shown = 0
    while True:
        asked = ["squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T"]
        queue = subprocess.run(asked, capture_output=True, text=True)
        states = set(queue.stdout.split())
        over = not states or not states & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING",
                                           "SUSPENDED", "REQUEUED"}  # fmt: skip
        if log.is_file():
            with log.open("rb") as file:
                file.seek(shown)
                new = file.read()
            shown += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        if over:
            print(f"job {job}: {', '.join(sorted(states)) or 'has left the queue'}")
            return
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
                      "alexnet --dataset cifar10")  # fmt: skip
    check(options)
    settings = trainer_settings(arguments, options.python or sys.executable)
    check_settings(settings, options)
    command, env = sbatch_command(options, arguments), job_environment(options)
    warning = warn_of_time(settings, options, HERE / "runs")
    if warning:
        print(warning, file=sys.stderr)
    told = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    print(f"{told} {shlex.join(command)}".strip(), flush=True)
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
    again = shlex.join(["python", "launch/submit.py", *own, "--", "--resume", run])
    print(f"job     {job}")
    print(f"log     {log}")
    print(f"follow  tail -F {shlex.quote(log)}     squeue --jobs {job}")
    print(f"stop    scancel {job}     saves, and does not requeue")
    print(f"go on   {again}", flush=True)
    if options.follow and options.array:
        raise Problem("--follow shows one log: follow an array's task with tail -F")
    if options.follow:
        try:
            follow(job, HERE / log)
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
