"""Several nodes, each with its own terminal and disk: what ends one ends all, in words."""

import socket
from pathlib import Path

import pytest
from launches import SMALL, command, finish, start

TINY = ["--model", "resnet18", *SMALL, "--limit", "64", "--max-steps", "1"]


def on_two_nodes(folder: Path, first: list[str], second: list[str], **env: str) -> list:
    """One process on each of two nodes, in folders of their own, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank, words in enumerate((first, second)):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                 "GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "LOCKSTEP_TIMEOUT": "60"}  # fmt: skip
        (folder / f"n{rank}").mkdir(exist_ok=True)
        started.append(start(command([*TINY, *words]), folder / f"n{rank}", **place, **env))
    return [finish(*one) for one in started]


@pytest.mark.slow
def test_every_node_ends_and_says_why_whoever_finds_it(tmp_path):
    """A wrong flag on one node, a run that only the head has, settings that differ."""
    head, node = on_two_nodes(tmp_path, [], ["--lrr", "1"])
    assert (head.status, node.status) == (2, 2), (head.out, node.out)
    assert "rank 1 on " in head.out and "--lrr: no such option" in head.out
    assert "the head node finds nothing wrong" in head.out
    assert node.out.count("--lrr: no such option") == 1
    head, node = on_two_nodes(tmp_path, ["--lrr", "1"], [])
    assert (head.status, node.status) == (2, 2), (head.out, node.out)
    assert head.out.count("--lrr: no such option") == 1 == node.out.count("--lrr: no such option")
    head, node = on_two_nodes(tmp_path, ["--lr", "0.1"], ["--lr", "0.2"])
    assert (head.status, node.status) == (2, 2), (head.out, node.out)
    for one in (head, node):
        assert one.out.count("disagree about the --lr: rank 1 on ") == 1, one.out
    assert not any("Traceback" in one.out for one in (head, node))


@pytest.mark.slow
def test_a_run_folder_that_the_nodes_do_not_share_is_named_at_the_start(tmp_path):
    head, node = on_two_nodes(tmp_path, ["--run-dir", "run"], ["--run-dir", "run"])
    assert (head.status, node.status) == (2, 2), (head.out, node.out)
    for one in (head, node):
        assert one.out.count(f"{tmp_path}/n1/run is not the folder that the main process") == 1
        assert "one disk" in one.out and "--run-dir" in one.out
    assert not (tmp_path / "n0" / "run").exists() and not (tmp_path / "n1" / "run").exists()
    shared = ["--run-dir", str(tmp_path / "run")]
    both = on_two_nodes(tmp_path, shared, shared)
    assert [one.status for one in both] == [0, 0], both
    own = tmp_path / "n0" / "run"
    (tmp_path / "run").rename(own)
    head, node = on_two_nodes(tmp_path, ["--resume", "run"], ["--resume", "run"])
    assert (head.status, node.status) == (2, 2), (head.out, node.out)
    for one in (head, node):
        assert one.out.count("--resume run: holds no run") == 1, one.out
