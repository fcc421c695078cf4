"""Random kills, signals and damage; the run that survives them equals the undisturbed one.

Five rounds in CI (slow); a long soak on demand:
`pytest tests/test_chaos.py -m chaos --rounds 100 -s`.
"""

import random
import signal
import time

import pytest
from launches import SMALL, command, finish, rows, same_weights, start, train

from distributed.checkpoint import visible


def disturb(folder, chance: random.Random) -> str:
    """Between two lives: sometimes truncate a file of the newest checkpoint, or flip a bit."""
    found = visible(folder / "checkpoints")
    if len(found) < 2 or chance.random() < 0.5:
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
    name = f"chaos-{processes}-{seed}"
    arguments = ["--model", "full.py:Net", *SMALL, "--epochs", str(6 * rounds), "--augment", "crop"]
    arguments += ["--checkpoint-every", "5", "--ema", "0.9", "--limit", "640", "--lr", "0.002"]
    arguments += ["--stop-after", str(40 * rounds)]
    whole = train([*arguments, "--run-dir", f"{name}-whole"], nets, processes)
    assert whole.status == 0, whole.out
    for number in range(rounds):
        process, log = start(command([*arguments, "--run-dir", name], processes), nets)
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
    done = train([*arguments, "--run-dir", name], nets, processes)
    assert done.status == 0, done.out
    assert rows(nets / name) == rows(nets / f"{name}-whole")
    assert same_weights(nets / name, nets / f"{name}-whole") == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_signalled_and_damaged_at_random_loses_nothing(nets, processes):
    soak(nets, rounds=5 - processes, seed=processes, processes=processes)


@pytest.mark.chaos
def test_a_long_soak(nets, request):
    soak(nets, request.config.getoption("--rounds"), seed=2026, processes=1)
