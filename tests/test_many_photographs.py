"""The memory of a run does not grow with the number of its photographs."""

from pathlib import Path

import pytest
from launches import train
from test_photographs import NET, encoded, noise

RUN = ["--model", "net.py:Net", "--image-size", "48", "--batch-size", "16", "--max-steps", "12"]
RUN += ["--augment", "resized_crop", "--threads", "1", "--decode-threads", "2", "--no-plots"]
RUN += ["--eval-every", "1000", "--checkpoint-every", "1000"]
WATCH = """
import atexit, os

def told():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            open(os.environ["ANONYMOUS"], "w").write(line.split()[1])

atexit.register(told)
"""


def many(folder: Path, count: int) -> None:
    """So many files of a few photographs, each with a comment of its own."""
    pictures = [encoded(noise(90, 120, number)) for number in range(20)]
    for number in range(count):
        comment = f"{number:08}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        side = "test" if number % 200 < 2 else "train"
        path = folder / side / f"class{number % 2}" / f"a name of some length {number:08}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = pictures[number % len(pictures)]
        path.write_bytes(picture[:2] + segment + picture[2:])


@pytest.mark.slow
def test_ten_times_the_photographs_take_no_more_memory(tmp_path):
    (tmp_path / "net.py").write_text(NET + WATCH)  # what a model's file does runs in the process
    anonymous = {}
    for count in (2_000, 20_000):
        many(tmp_path / f"photos{count}", count)
        for life in ("scanned", "cached"):
            words = [*RUN, "--dataset", f"photos{count}", "--run-dir", f"run{count}{life}"]
            done = train(
                words, tmp_path, ANONYMOUS=str(tmp_path / "anonymous"), LOCKSTEP_CACHE_SIZE="30MB",
                LOCKSTEP_CACHE=str(tmp_path / "cache"),
            )  # fmt: skip
            assert done.status == 0, done.out
            assert "decoded from their files" in " ".join(done.out.split())
            anonymous[count, life] = int((tmp_path / "anonymous").read_text()) / 1024
            (tmp_path / "anonymous").unlink()
    for life in ("scanned", "cached"):
        assert anonymous[20_000, life] - anonymous[2_000, life] < 64, anonymous
