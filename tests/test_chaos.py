"""Random kills, signals and damage; the run that survives them equals the undisturbed one.

Five rounds in CI (slow); a long soak on demand:
`pytest tests/test_chaos.py -m chaos --rounds 100 -s`.
"""

import random
import signal
import time

import pytest
from launches import SMALL, command, finish, rows, same_weights, start, train

from common.disk import read_json
from distributed.checkpoint import visible


def disturb(folder, chance: random.Random) -> str:
    """Between two lives: sometimes truncate a file of the newest checkpoint, or flip a bit.

    Of a snapshot in memory too: they all may be damaged, since the disk has what is older.
    """
    found = visible(folder / "checkpoints")
    in_memory = list((folder.parent / "memory").glob("lockstep-*/step-*[0-9]"))
    if in_memory and chance.random() < 0.3:
        found = in_memory
    elif len(found) < 2 or chance.random() < 0.5:
        return ""
    path = chance.choice([p for p in found[0].iterdir() if p.stat().st_size > 64])
    content = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        path.write_bytes(content[: chance.randrange(len(content))])
        return f", {path.name} truncated"
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f", a bit of {path.name} flipped"


def soak(nets, rounds: int, seed: int, processes: int) -> None:
    chance = random.Random(seed)
    name, memory = f"chaos-{processes}-{seed}", nets / "memory"
    memory.mkdir(exist_ok=True)
    arguments = ["--model", "full.py:Net", *SMALL, "--epochs", str(6 * rounds), "--augment", "crop"]
    arguments += ["--checkpoint-every", "5", "--ema", "0.9", "--limit", "640", "--lr", "0.002"]
    arguments += ["--stop-after", str(40 * rounds), "--snapshot-every", "3"]
    whole = train([*arguments, "--run-dir", f"{name}-whole"], nets, processes)
    assert whole.status == 0, whole.out
    for number in range(rounds):
        words = command([*arguments, "--run-dir", name], processes)
        process, log = start(words, nets, LOCKSTEP_SHM=str(memory))
        time.sleep(chance.uniform(4.0, 9.0 + 3 * processes))
        # torchrun itself dies of USR1 and INT goes to its group: launch/torchrun.sh sees to that
        kinds = ["SIGKILL", "SIGTERM"] + ["SIGUSR1", "SIGINT"] * (processes == 1)
        kind = chance.choice(kinds)
        process.send_signal(getattr(signal, kind))
        done = finish(process, log, 180)
        # a killed agent leaves ranks behind that notice, save and end by themselves
        time.sleep(0.5 if processes == 1 else 6)
        print(f"round {number}: {kind}, status {done.status}{disturb(nets / name, chance)}")
        assert "Traceback" not in done.out.split("torch/distributed/elastic")[0], done.out
    done = train([*arguments, "--run-dir", name], nets, processes, LOCKSTEP_SHM=str(memory))
    assert done.status == 0 and not list(memory.glob("lockstep-*")), done.out
    assert rows(nets / name) == rows(nets / f"{name}-whole")
    assert same_weights(nets / name, nets / f"{name}-whole") == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_signalled_and_damaged_at_random_loses_nothing(nets, processes):
    soak(nets, rounds=5 - processes, seed=processes, processes=processes)


@pytest.mark.chaos
def test_a_long_soak(nets, request):
    soak(nets, request.config.getoption("--rounds"), seed=2026, processes=1)


def accident(chance: random.Random, step: int, processes: int) -> str:
    """What happens to one process of a life that goes on at this step."""
    rank, at = chance.randrange(processes), step + chance.randrange(2, 12)
    what = chance.choice(["save", "snapshot"])
    point = f"{what}:{chance.choice(['begin', 'written', 'manifest', 'renamed', 'pruned'])}"
    return chance.choice([
        f"kill@step={at},rank={rank}",
        f"kill@point=backward,step={at},rank={rank}",
        f"term@step={at},rank={rank}",
        f"oom@step={at},rank={rank}",
        f"hang@step={at},rank={rank},seconds=1.5;kill@step={at + 2},rank={rank}",
        f"kill@point={point}",
        f"enospc@point={point};term@step={at},rank={rank}",
    ])  # fmt: skip


def roam(nets, rounds: int, seed: int) -> None:
    """Each life on another number of processes, in each an accident: the same bits in the end."""
    chance, name, memory = random.Random(seed), f"roam-{seed}", nets / "memory"
    memory.mkdir(exist_ok=True)
    words = ["--model", "full.py:Net", *SMALL, "--epochs", str(6 * rounds), "--augment", "crop"]
    words += ["--checkpoint-every", "5", "--ema", "0.9", "--limit", "640", "--lr", "0.002"]
    words += ["--stop-after", str(12 * rounds + 20), "--shards", "4", "--bitwise"]
    words += ["--snapshot-every", "3"]
    whole = train([*words, "--run-dir", f"{name}-whole"], nets)
    assert whole.status == 0, whole.out
    for number in range(rounds):
        step = read_json(nets / name / "status.json", {}).get("step", 0)
        processes = chance.randrange(1, 5)
        planted = accident(chance, step, processes)
        env = {"LOCKSTEP_FAULT": planted, "LOCKSTEP_SHM": str(memory)}
        done = train([*words, "--run-dir", name], nets, processes, **env)
        at = read_json(nets / name / "status.json", {}).get("step")
        print(f"round {number}: {processes} processes, {planted}, status {done.status}, step {at}"
              f"{disturb(nets / name, chance)}")  # fmt: skip
        assert at is not None and "disagree" not in done.out, done.out
    last = chance.randrange(1, 5)
    done = train([*words, "--run-dir", name], nets, last, LOCKSTEP_SHM=str(memory))
    assert done.status == 0 and not list(memory.glob("lockstep-*")), done.out
    assert rows(nets / name) == rows(nets / f"{name}-whole")
    assert same_weights(nets / name, nets / f"{name}-whole") == []


@pytest.mark.slow
def test_a_run_that_changes_its_processes_with_each_accident_has_the_same_bits(nets):
    roam(nets, rounds=5, seed=4)


@pytest.mark.chaos
def test_a_long_journey(nets, request):
    roam(nets, request.config.getoption("--rounds"), seed=2027)
