"""Laws of evaluating a run on other data: classes by name, the run's own numbers, every picture."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from launches import python, train
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
RUN = ["--image-size", "16", "--batch-size", "12", "--epochs", "2", "--threads", "1", "--no-plots"]
RUN += ["--shards", "2"]


def draw(root: Path, colours: dict[str, int], count: int, side: int, seed: int = 0) -> Path:
    """Class folders, each of one bright channel."""
    noise = np.random.default_rng(seed)
    for name, channel in colours.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 150, (side, side, 3))
            pixels[..., channel] += noise.integers(0, 60)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03}.png")
    return root


def predicted(folder: Path, run: str, pictures: Path) -> dict[str, str]:
    """The class of each picture by predict.py."""
    done = python(REPOSITORY / "predict.py", pictures, "--run", run, "--csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    table = csv.DictReader(io.StringIO(done.stdout))
    best: dict[str, str] = {}
    for row in table:
        best.setdefault(row["path"], row["class"])
    return best


@pytest.mark.parametrize("side", [16, 80])
@pytest.mark.slow
def test_a_run_is_evaluated_on_other_data_as_predict_sees_them(nets, tmp_path, side):
    draw(tmp_path / "own", {"ant": 0, "bee": 1, "cow": 2}, 20, side)
    # Two of its classes, in another order of folders, darker, and without a split.
    draw(tmp_path / "other", {"cow": 2, "bee": 1}, 9, side, seed=1)
    words = ["--model", f"{nets / 'plain.py'}:Net", "--dataset", "own", *RUN]
    cache = {"LOCKSTEP_CACHE": str(tmp_path / "cache")}
    done = train([*words, "--run-dir", "r"], tmp_path, **cache)
    assert done.status == 0, done.out
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").iterdir() if p.is_file()}
    found = []
    for processes in (1, 2):
        done = train(
            ["--resume", "r", "--eval-only", "--dataset", "other"], tmp_path, processes, **cache
        )
        assert done.status == 0 and "evaluations/other.json" in done.out, done.out
        found.append(json.loads((tmp_path / "r" / "evaluations" / "other.json").read_text()))
    told = found[0]
    assert found[0]["test"]["confusion"] == found[1]["test"]["confusion"]
    assert told["test"]["images"] == 18 and told["classes"] == ["ant", "bee", "cow"]
    answers = predicted(tmp_path, "r", tmp_path / "other")
    table = np.zeros((3, 3), int)
    for path, name in answers.items():
        table[told["classes"].index(Path(path).parent.name), told["classes"].index(name)] += 1
    assert told["test"]["confusion"] == table.tolist()
    assert {p: p.stat().st_mtime_ns for p in before} == before
    (tmp_path / "more").mkdir()
    shutil.move(tmp_path / "other", tmp_path / "more" / "other")
    done = train(["--resume", "r", "--eval-only", "--dataset", "more/other"], tmp_path, **cache)
    assert done.status == 0
    names = sorted(path.name for path in (tmp_path / "r" / "evaluations").glob("*.json"))
    assert len(names) == 2 and "other.json" in names and names[0].startswith("other-")
    (tmp_path / "more" / "other" / "bee").rename(tmp_path / "more" / "other" / "wasp")
    done = train(["--resume", "r", "--eval-only", "--dataset", "more/other"], tmp_path, **cache)
    assert done.status == 2 and "classes that it does not know" in done.out and "wasp" in done.out
