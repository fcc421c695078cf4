"""What of a run only one machine can see is told before several are asked for."""

from pathlib import Path

import pytest
from launches import SMALL, python, train
from PIL import Image
from test_nodes import on_two_nodes

from common.mounts import own_disk
from config import own_disks, parse

TABLE = r"""
/dev/sda1 / ext4 rw 0 0
server:/nfs /nfs nfs4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/sdb1 /nfs/big\040disk xfs rw 0 0
lustre@tcp:/scratch /tmp/shared lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "disk"),
    [
        ("/data/pictures", "ext4 at /"),
        ("/nfs/me/runs", ""),
        ("/tmp/not/yet/there", "tmpfs at /tmp"),
        ("/nfs/big disk/x", "xfs at /nfs/big disk"),
        ("/nfs/bigger", ""),
        ("/tmp/shared/runs", ""),
    ],
)
def test_a_path_is_on_the_disk_that_is_mounted_nearest_above_it(tmp_path, path, disk):
    (tmp_path / "mounts").write_text(TABLE)
    assert own_disk(Path(path), tmp_path / "mounts") == disk
    assert own_disk(Path(path), tmp_path / "no such table") == ""


@pytest.fixture
def pictures(tmp_path):
    """A folder of grey pictures of two classes."""
    for split in ("train", "test"):
        for number in range(16):
            path = tmp_path / "pictures" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number).save(path)
    return tmp_path / "pictures"


@pytest.mark.slow
def test_two_nodes_are_told_what_lies_on_one_of_them_and_one_is_not(pictures, tmp_path):
    if not own_disk(tmp_path):
        pytest.skip("this machine's temporary files lie on a disk that others may share")
    flags = ["--model", "resnet18", "--dataset", str(pictures), "--run-dir", str(tmp_path / "run")]
    told = own_disks(parse(flags).config)
    assert [text.split()[0] for text in told] == ["--dataset", "--run-dir"]
    for nodes in (1, 2):
        words = ["--nodes", nodes, "--gpus", "8", "--dry-run", "--", *flags, "--weights", "none"]
        done = python("launch/submit.py", *words)
        assert done.returncode == 0, done.stderr
        for text in told:
            assert (f"warning: {text}" in done.stderr) == (nodes == 2), done.stderr
    small = [*SMALL, "--model", "resnet18", "--dataset", str(pictures), "--dry-run"]
    for count in (8, 16):
        done = train([*small, "--batch-size", "16", "--as", count], tmp_path)
        assert done.status == 0, done.out
        assert (f"--dataset {pictures} lies on this machine's own disk" in done.out) == (count > 8)


@pytest.mark.slow
def test_pictures_that_one_node_lacks_are_named_with_it(pictures, tmp_path):
    (tmp_path / "n0").mkdir()
    pictures.rename(tmp_path / "n0" / "pictures")
    words = ["--dataset", "pictures", "--run-dir", str(tmp_path / "run")]
    head, node = on_two_nodes(tmp_path, words, words)
    assert (head.status, node.status) == (2, 2), (head.out, node.out)
    assert "rank 1 on " in head.out and "pictures" in head.out and "Traceback" not in head.out
