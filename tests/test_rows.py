"""Laws of tables of photographs: the pictures of their folder, never all of them in memory."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launches import rows, same_weights, train
from test_pack import KEEP, make, prepared, seen
from test_photographs import NET

from common.errors import UserError
from data import rows as lying
from data.ahead import pool_of
from data.sources import load_source, tables


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


def table_of(folder: Path, files: Path, in_a_group: int, form: str = "parquet", split=True) -> Path:
    """The pictures of a folder as rows, in its order; without a split all are of training."""
    import pyarrow
    import pyarrow.parquet

    source = load_source(str(files))
    folder.mkdir()
    parts = {"train": [source.train], "test": [source.test]}
    parts = parts if split else {"train": [source.train, source.test]}
    for name, those in parts.items():
        names = [n for part in those for n in part.names]
        cells = [{"bytes": (files / n).read_bytes(), "path": n} for n in names]
        table = pyarrow.table({"image": cells, "label": [n.partition("/")[0] for n in names]})
        if form == "parquet":
            to = folder / f"{name}.parquet"
            pyarrow.parquet.write_table(table, to, row_group_size=in_a_group)
        else:
            with (
                pyarrow.OSFile(str(folder / f"{name}.arrow"), "wb") as file,
                pyarrow.ipc.new_stream(file, table.schema) as writer,
            ):
                writer.write_table(table, max_chunksize=in_a_group)
    return folder


@pytest.fixture
def photographs(tmp_path):
    return make(tmp_path / "photographs", 60)


@pytest.mark.parametrize(
    ("form", "small", "words"),
    [
        ("parquet", True, "decoded from row groups of at most"),
        ("parquet", False, "decoded from the cache, as they were copied out of their tables"),
        ("arrow", True, "decoded from the files that hold them"),
    ],
)
def test_rows_are_the_pictures_of_the_folder_wherever_they_lie(
    photographs, tmp_path, monkeypatch, form, small, words
):
    monkeypatch.setattr(tables, "SMALL_GROUP", 10**6 if small else 10)
    monkeypatch.setattr(lying, "HELD", 1)  # two groups
    files = load_source(str(photographs))
    folder = table_of(tmp_path / "table", photographs, 7, form)
    said: list[str] = []
    first = load_source(str(folder), say=said.append)
    assert first.train.photos.store.words.startswith(words)
    assert [one for one in said if "copied out once" in one] == [
        one for one in said[:1] if not small
    ]
    assert first.classes == files.classes and first.mean == files.mean
    assert torch.equal(seen(first), seen(files))
    said.clear()
    assert load_source(str(folder), image_size=48, say=said.append).content == first.content
    assert torch.equal(seen(load_source(str(folder), say=said.append)), seen(files))
    assert not any("copied" in one for one in said)
    out = prepared(folder, tmp_path / "pack", "--store", "raw", *KEEP)
    assert torch.equal(seen(load_source(str(out))), seen(files))
    for made in (tmp_path / "cache").glob("*.rows"):  # as somebody who needs room does
        shutil.rmtree(made)
    assert torch.equal(seen(load_source(str(folder))), seen(files))


def test_without_a_split_a_fifth_tests_by_the_bytes_wherever_they_lie(
    photographs, tmp_path, monkeypatch
):
    found = set()
    for number, (form, small) in enumerate((("parquet", 10**6), ("parquet", 10), ("arrow", 10))):
        monkeypatch.setattr(tables, "SMALL_GROUP", small)
        folder = table_of(tmp_path / f"table{number}", photographs, 7, form, split=False)
        found.add(load_source(str(folder)).fingerprint)
    monkeypatch.setattr(tables, "_photographs", lambda *_: None)  # all of them in memory
    shutil.rmtree(tmp_path / "cache")
    found.add(load_source(str(folder)).fingerprint)
    assert len(found) == 1


def test_what_a_killed_copying_finished_is_not_made_again(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SMALL_GROUP", 10)
    monkeypatch.setattr(lying, "cpus", lambda: 1)
    folder = table_of(tmp_path / "table", photographs, 7)
    if not (child := os.fork()):
        contents = lying.Column.contents

        def until(self):
            if self.file.name == "train.parquet":  # the second in turn
                yield from itertools.islice(contents(self), 3)
                os.kill(os.getpid(), signal.SIGKILL)
            yield from contents(self)

        monkeypatch.setattr(lying.Column, "contents", until)
        monkeypatch.setattr(tables, "_some_large", lambda _: True)
        load_source(str(folder))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (half,) = (tmp_path / "cache").glob("*.rows")
    before = {path: path.stat().st_mtime_ns for path in half.glob("*.bin")}
    assert [path.name for path in before] == ["rows-00000.bin"]
    found = load_source(str(folder))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(half.glob("*.partial"))
    assert torch.equal(seen(found), seen(load_source(str(photographs))))


def test_what_is_wrong_with_tables_of_photographs_is_a_sentence(photographs, tmp_path, monkeypatch):
    folder = table_of(tmp_path / "table", photographs, 7)

    def code() -> str:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with pytest.raises(UserError) as caught:
            load_source(str(folder))
        return caught.value.code

    monkeypatch.setattr(tables, "SMALL_GROUP", 10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
        assert code() == "disk-full"
    with monkeypatch.context() as patch:  # a group may be one page, which is read as a whole
        made, told = [], []
        patch.setattr(lying, "memory", lambda: 1)
        patch.setattr(lying, "pool_of", lambda n: made.append(n) or pool_of(n))
        load_source(str(folder), say=told.append)
        assert made == [1]
        assert "of memory meanwhile, where a group is one page" in told[0]
    whole = (folder / "train.parquet").read_bytes()
    for limit in (10, 10**6):
        monkeypatch.setattr(tables, "SMALL_GROUP", limit)
        damaged = whole[: len(whole) // 2] + bytes(2000) + whole[len(whole) // 2 + 2000 :]
        (folder / "train.parquet").write_bytes(damaged)
        assert code() == "bad-table"
        (folder / "train.parquet").write_bytes(whole[:-100])
        assert code() == "bad-table"


RUN = ["--model", "net.py:Net", "--image-size", "16", "--batch-size", "8", "--epochs", "2"]
RUN += ["--augment", "resized_crop", "--threads", "1", "--log-every", "1", "--no-plots"]
RUN += ["--shards", "4", "--bitwise", "--checkpoint-every", "2", "--lr", "0.05"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "in_a_group", "words"),
    [
        ("parquet", 1, "row groups of at most"),
        ("parquet", 60, "copied out once"),
        ("arrow", 60, "the files that hold them"),
    ],
)
def test_a_run_on_rows_is_the_run_on_files_on_two_processes_and_after_a_kill(
    tmp_path, form, in_a_group, words
):
    (tmp_path / "net.py").write_text(NET)
    photographs = make(tmp_path / "photographs", 60, 1200, 900)
    table_of(tmp_path / "table", photographs, in_a_group, form)
    cache = {"LOCKSTEP_CACHE_SIZE": "0"}
    done = train([*RUN, "--dataset", photographs, "--run-dir", "files"], tmp_path, **cache)
    assert done.status == 0, done.out
    flags = [*RUN, "--dataset", "table", "--run-dir", "rows"]
    killed = train(flags, tmp_path, 2, LOCKSTEP_FAULT="kill@step=5", **cache)
    assert killed.status != 0 and words in " ".join(killed.out.replace("│", " ").split())
    done = train(flags, tmp_path, 2, **cache)
    assert done.status == 0, done.out
    found, expected = (
        [{k: v for k, v in row.items() if k != "data/wait"} for row in rows(tmp_path / name)]
        for name in ("rows", "files")
    )
    assert found == expected
    assert same_weights(tmp_path / "rows", tmp_path / "files") == []
