"""Are two runs the same experiment? `python -m bench.same runs/a runs/b` says what differs.

Compares settings (placement and reporting aside), data, order, model and code by their
fingerprints, and the packages' versions. Exit status 0: the same experiment; 1: not.
"""

import argparse
import json
from pathlib import Path

from common.streams import exit_told
from config import MAY_CHANGE

PLACEMENT = MAY_CHANGE - {"epochs", "max_steps", "eval_every", "tta"}
MEANING = {
    "data": "other training or test images",
    "order": "another order of the samples (seed, number of images, batch size)",
    "model": "another architecture",
    "code": "another version of the program or of the model's file",
}


def read(folder: Path) -> tuple[dict, dict]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        return config, json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{folder} is no run that can be read ({error})") from None


def differences(one: Path, two: Path) -> list[str]:
    """A sentence for each thing that makes two runs different experiments."""
    (config, facts), (other_config, other_facts) = read(one), read(two)
    found = [
        f"--{name.replace('_', '-')}: {config.get(name)} and {other_config.get(name)}"
        for name in sorted(config.keys() | other_config.keys())
        if name not in PLACEMENT and config.get(name) != other_config.get(name)
    ]
    for name, meaning in MEANING.items():
        if facts.get(name) != other_facts.get(name):
            found.append(f"{name}: {meaning} ({facts.get(name)} and {other_facts.get(name)})")
    if hidden := hidden_state(one) or hidden_state(two):
        counts = facts.get("processes"), other_facts.get("processes")
        if counts[0] != counts[1]:
            found.append(f"processes: {counts[0]} and {counts[1]}, and the model hides {hidden}")
    packages, others = facts.get("packages", {}), other_facts.get("packages", {})
    for name in sorted(packages.keys() | others.keys()):
        if packages.get(name) != others.get(name):
            found.append(f"{name}: version {packages.get(name)} and {others.get(name)}")
    return found


def hidden_state(run: Path) -> str:
    """What the model keeps beside its buffers; such a run is the same on as many processes only."""
    return read(run)[1].get("hidden_state", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path)
    one, two = parser.parse_args().runs
    found = differences(one, two)
    same = f"{one} and {two} are the same experiment"
    if hidden := hidden_state(one):
        same += f", on this number of processes only: the model hides {hidden}"
    print("\n".join(found) or same)
    return int(bool(found))


if __name__ == "__main__":
    exit_told(main)
