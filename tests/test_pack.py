"""Laws of packs: the same pictures as their files, whole or told, finished work is never redone."""

import errno
import io
import os
import shutil
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from launches import rows, same_weights, train
from PIL import Image

from common.errors import UserError
from data import pack
from data.__main__ import main
from data.cache import digest_of, read_entry
from data.cuts import Cuts
from data.sources import load_source

KEEP = ("--short-side", "keep")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


def make(root: Path, count: int, width: int = 100, height: int = 80) -> Path:
    """A folder of photographs: JPEG, some turned by EXIF, some grey, and PNG, some transparent."""
    noise = np.random.default_rng(count)
    for number in range(count):
        folder = root / ("cat", "dog", "emu")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        side = (height, width - number % 7) if number % 2 else (width, height + number % 5)
        small = noise.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        image, exif = Image.fromarray(small).resize(side, Image.Resampling.BICUBIC), Image.Exif()
        path = folder / f"{number:05}"
        if number % 5 == 1:
            exif[0x0112] = 1 + number % 8
        if number % 5 == 2:
            image = image.convert("L")
        if number % 5 == 3:
            image.putalpha(200)
            image.save(f"{path}.png")
        else:
            image.save(f"{path}.jpg", quality=90, exif=exif)
    return root


@pytest.fixture
def photographs(tmp_path):
    return make(tmp_path / "photographs", 60)


def prepared(dataset: Path, out: Path, *words: str) -> Path:
    assert main(["prepare", "--dataset", str(dataset), "--out", str(out), *words]) == 0
    return out


def code_of(*words) -> str:
    """Of the mistake that a command ends with."""
    from data import __main__ as commands

    options = commands.build_parser().parse_args([str(word) for word in words])
    with pytest.raises(UserError) as caught:
        if options.run is commands._check:
            commands._check(options)
        else:
            options.run(load_source(options.dataset), options)
    return caught.value.code


def content_of(folder: Path) -> dict[str, bytes | str]:
    """Bytes of all files of a pack; of the index, whose header has no order, what it says."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != pack.LOCK}
    tensors, meta = read_entry(folder / pack.INDEX)
    return found | {pack.INDEX: repr(({k: digest_of(t) for k, t in tensors.items()}, meta))}


def seen(source, image_size: int = 32, scaled: bool = False) -> torch.Tensor:
    """All pictures of both splits, as training and as evaluation see them."""
    from data.loaders import decoding_of, place

    cpu, found = torch.device("cpu"), []
    cuts = Cuts("resized_crop", image_size, image_size, image_size * 8 // 7, "crop", 0)
    for part in (source.train, source.test):
        pictures, _ = place(part, cpu, decoding_of(cuts, source.mean, 2, cpu, scaled))
        batch = pictures.__getitems__(torch.arange(len(part)))
        found += [next(iter(pictures.in_flight([dict(batch)], e)))["images"] for e in (3, None)]
        assert not pictures.left_out
    return torch.cat(found)


# The same pictures


def test_files_and_packs_that_keep_them_are_one_data_set(photographs, tmp_path):
    files = load_source(str(photographs))
    expected = seen(files)
    for store in ("jpeg", "raw"):
        out = prepared(photographs, tmp_path / store, "--store", store, *KEEP)
        moved = shutil.move(out, tmp_path / f"{store} moved")
        for size in (None, 48):
            found, there = load_source(str(moved), image_size=size), files
            if size:  # its mean and std are those of pictures of that size
                there = load_source(str(photographs), image_size=size)
            for name in ("fingerprint", "classes", "mean", "std"):
                assert getattr(found, name) == getattr(there, name), (store, size, name)
        assert found.train.photos.names[7] == files.train.photos.names[7]
        assert torch.equal(seen(found), expected), store
        again = prepared(moved, tmp_path / f"{store} again", "--store", store, *KEEP)
        names = [path.name for path in moved.glob("*.bin")]
        assert names and all((again / n).read_bytes() == (moved / n).read_bytes() for n in names)
        assert load_source(str(again)).fingerprint == files.fingerprint
    assert code_of("prepare", "--dataset", moved, "--out", tmp_path / "x", *KEEP) == (
        "no-files-to-keep"
    )
    shutil.rmtree(photographs)
    assert len(seen(load_source(str(moved)))) == 120  # a pack is all that is needed


def test_smaller_jpegs_are_those_of_any_store_of_the_same_bytes(photographs, tmp_path):
    files = load_source(str(photographs))
    whole, smaller = seen(files, 12), seen(files, 12, scaled=True)
    same = (whole == smaller).flatten(1).all(dim=1)
    assert same.any() and not same.all()  # PNG and small parts stay as they were
    assert 0 < (whole.float() - smaller.float()).abs().mean() < 8
    jpeg = prepared(photographs, tmp_path / "jpeg", "--store", "jpeg", *KEEP)
    assert torch.equal(seen(load_source(str(jpeg)), 12, scaled=True), smaller)
    raw = prepared(photographs, tmp_path / "raw", "--store", "raw", *KEEP)
    assert torch.equal(seen(load_source(str(raw)), 12, scaled=True), whole)  # they lie decoded


def test_whole_pictures_that_lie_decoded_are_scaled_once_while_there_is_room(
    photographs, tmp_path, monkeypatch
):
    from data import kept
    from data import photographs as module

    def fails(*_):
        raise OSError(errno.ENOSPC, "no space")

    expected, scaled, scale = seen(load_source(str(photographs)), 16), [], module.scale
    out = prepared(photographs, tmp_path / "raw", "--store", "raw", *KEEP)
    monkeypatch.setattr(module, "scale", lambda *given: scaled.append(1) or scale(*given))
    counts = []
    for owner, name, value in (
        (kept, "ROOM", 2**29), (kept, "ROOM", 20_000), (kept, "MOST", 7), (os, "pwrite", fails),
        (os, "pread", fails), (os, "getpid", iter(range(999)).__next__),  # as a fork would be
        (shutil, "disk_usage", lambda _: SimpleNamespace(free=9_999)),
        (kept, "size_limit", lambda: 0),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(kept, "size_limit", value if name == "size_limit" else kept.size_limit)
            source = load_source(str(out))
            patch.setattr(owner, name, value)
            assert torch.equal(seen(source, 16), expected)
            scaled.clear()
            assert torch.equal(seen(source, 16), expected)
        counts.append(len(scaled))
    parts, *some = counts[:-5]  # what training cuts is a part, each time anew
    (one,) = {*counts[-5:]}
    assert parts <= 60 and one == parts + 60
    assert all(parts < count < one for count in some)


def test_a_scaled_pack_has_whole_pictures_and_a_fingerprint_of_its_own(photographs, tmp_path):
    fingerprints = {load_source(str(photographs)).fingerprint}
    for store in ("jpeg", "raw"):
        out = prepared(photographs, tmp_path / store, "--store", store, "--short-side", "40")
        source, files = load_source(str(out)), load_source(str(photographs))
        fingerprints.add(source.fingerprint)
        ratio = files.train.sizes[:, 0] / files.train.sizes[:, 1]
        assert (source.train.sizes.min(dim=1).values == 40).all()
        assert torch.allclose(source.train.sizes[:, 0] / source.train.sizes[:, 1], ratio, atol=0.03)
        assert (seen(source).float() - seen(files).float()).abs().mean() < 8
    assert len(fingerprints) == 3
    larger = prepared(photographs, tmp_path / "larger", "--short-side", "90")
    assert torch.equal(
        load_source(str(larger)).train.sizes.min(dim=1).values,
        load_source(str(photographs)).train.sizes.min(dim=1).values.clamp(max=90),
    )


@pytest.mark.slow
def test_a_run_has_the_same_numbers_from_files_and_from_packs(photographs, tmp_path, nets):
    homes = {"files": photographs, "cached": photographs}
    for store in ("jpeg", "raw"):
        homes[store] = prepared(photographs, tmp_path / store, "--store", store, *KEEP)
    flags = [
        "--model", f"{nets}/full.py:Net", "--image-size", "16", "--batch-size", "16",
        "--augment", "resized_crop", "--epochs", "2", "--threads", "1", "--log-every", "1",
        "--no-plots",
    ]  # fmt: skip
    numbers = {}
    for name, dataset in homes.items():
        words = [*flags, "--dataset", dataset, "--run-dir", f"run {name}"]
        no_room = {"LOCKSTEP_CACHE_SIZE": "0"} if name == "files" else {}
        done = train(words, tmp_path, **no_room)
        assert done.status == 0, done.out
        numbers[name] = [
            {k: v for k, v in r.items() if k != "data/wait"} for r in rows(tmp_path / f"run {name}")
        ]
        assert numbers[name] == numbers["files"], name
        assert same_weights(tmp_path / f"run {name}", tmp_path / "run files") == [], name
    assert len(list((tmp_path / "cache").glob("*.pack"))) == 1  # the small folder was decoded once


# Whole or told


def killed(dataset: Path, out: Path, at: int, monkeypatch) -> None:
    """`prepare` in a process that is killed when it comes to picture `at`."""
    child = os.fork()
    if not child:
        made = pack._Packing._content

        def content(self, row):
            if row == at and (out / "shard-00000.bin").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return made(self, row)

        monkeypatch.setattr(pack._Packing, "_content", content)
        main(["prepare", "--dataset", str(dataset), "--out", str(out), *KEEP])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_what_a_killed_prepare_finished_is_not_made_again(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(pack, "CHUNK", 2)
    load_source(str(photographs))
    whole = prepared(photographs, tmp_path / "whole", *KEEP)
    out = tmp_path / "killed"
    killed(photographs, out, 41, monkeypatch)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.bin")}
    assert 0 < len(finished) < len(list(whole.glob("shard-*.bin")))
    with pytest.raises(UserError, match="go on with python -m data prepare") as caught:
        load_source(str(out))
    assert caught.value.code == "pack-unfinished"
    prepared(photographs, out, *KEEP)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert content_of(out) == content_of(whole)


def test_a_flipped_byte_is_found_and_mended(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "SHARD_BYTES", 20_000)
    for store in ("jpeg", "raw"):
        out = prepared(photographs, tmp_path / store, "--store", store, *KEEP)
        assert main(["check", str(out)]) == main(["check", "--dataset", str(out)]) == 0
        before = content_of(out)
        damaged = out / "shard-00001.bin"
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        first = out / "shard-00000.bin"
        kept = first.stat().st_mtime_ns
        photos = load_source(str(out)).train.photos
        with pytest.raises(ValueError, match="damaged"):  # no run trains on it
            [photos.pixels(place) for place in range(len(photos))]
        capsys.readouterr()
        assert main(["check", str(out)]) == 2
        told = capsys.readouterr().err
        assert "shard-00001.bin" in told and f"--out '{out}'".replace("'", "") in told
        prepared(photographs, out, "--store", store, *KEEP)
        assert content_of(out) == before and first.stat().st_mtime_ns == kept
        assert main(["check", str(out)]) == 0
        damaged.write_bytes(bytes(content[:-1]))
        with pytest.raises(UserError) as caught:
            load_source(str(out))
        assert caught.value.code == "pack-damaged"
        (out / pack.INDEX).write_bytes(b"nothing")
        assert code_of("check", out) == "pack-damaged"


def test_what_goes_wrong_is_a_sentence(photographs, tmp_path, monkeypatch):
    def code(out, *words) -> str:
        return code_of("prepare", "--dataset", photographs, "--out", out, *words)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    assert code(tmp_path / "full") == "output-not-empty"
    assert code(tmp_path / "full" / "thesis.txt") == "output-not-empty"
    assert code(tmp_path / "full" / "thesis.txt" / "below") == "output-unwritable"
    out = prepared(photographs, tmp_path / "out", *KEEP)
    assert code(out, "--store", "raw", *KEEP) == "other-pack"
    with pack._alone(out, False, "--out"):
        assert code(out, *KEEP) == "pack-in-use"
    assert code_of("check", photographs) == "no-pack"
    with pytest.raises(UserError) as caught:
        load_source("cifar10", data_dir=str(out))
    assert caught.value.code == "other-data-set"

    with monkeypatch.context() as patch:
        usage = type("usage", (), {"free": 1000})
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert code(tmp_path / "a") == "disk-full"
    prepared(photographs, tmp_path / "a", "--store", "raw")  # begun, and nothing came of it
    assert code(photographs / "cat" / "pack") == "output-in-data"
    assert not (photographs / "cat" / "pack").exists()
    for number, expected in ((errno.ENOSPC, "disk-full"), (errno.EROFS, "output-unwritable")):
        with monkeypatch.context() as patch:

            def refuse(path, content, number=number):
                if path.name != pack.BEGUN:
                    raise OSError(number, os.strerror(number))

            patch.setattr(pack, "write_json", refuse)
            assert code(tmp_path / f"b{number}") == expected

    picture = photographs / "cat" / "00000.jpg"
    content = pack._Packing._content
    for change, words in (("write", KEEP), ("write", ()), ("unlink", KEEP)):
        with monkeypatch.context() as patch:

            def changing(self, row, change=change):
                if row == 20 and change == "write":
                    os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1000))
                elif row == 20:
                    (photographs / self.photos.names[20]).unlink()
                return content(self, row)

            patch.setattr(pack._Packing, "_content", changing)
            assert code(tmp_path / f"c {change} {len(words)}", *words) == "source-changed"
    with monkeypatch.context() as patch:

        def replacing(self, row):
            if row == 10:
                Image.new("RGB", (30, 30)).save(self.photos.store.root / self.photos.names[10])
            return content(self, row)

        patch.setattr(pack._Packing, "_content", replacing)
        # Another picture is no damaged one.
        assert code(tmp_path / "d", "--short-side", "40") == "source-changed"
    assert code(out, *KEEP) == "source-changed"  # a picture less than when it was made


def test_a_pack_that_another_process_has_just_begun_is_waited_for(photographs, tmp_path):
    out, source = tmp_path / "cached", load_source(str(photographs))
    out.mkdir()
    with FileLock(out / pack.LOCK, thread_local=False) as other:
        (out / f"{pack.BEGUN}.partial").write_text("{")  # it is being written
        work = partial(
            pack.pack, source, pack.Form("raw"), out, image_size=64, command=[], wait=True
        )
        with ThreadPoolExecutor() as pool:
            packed = pool.submit(work)
            with pytest.raises(TimeoutError):
                packed.result(timeout=0.5)
            other.release()
            packed.result()
    assert pack.is_pack(out) and not list(out.glob("*.partial"))


def test_a_damaged_picture_is_named_or_left_out_as_from_its_file(photographs, tmp_path):
    picture = photographs / "dog" / "00004.jpg"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    for words in (("--store", "raw", *KEEP), ("--short-side", "40")):
        out = tmp_path / f"pack {words[-1]}"
        assert code_of("prepare", "--dataset", photographs, "--out", out, *words) == "bad-image"
        source = load_source(str(prepared(photographs, out, "--skip-bad-images", *words)))
        place = next(p for p in range(60) if source.train.photos.names[p].endswith("dog/00004.jpg"))
        with pytest.raises(ValueError, match=r"\w"):
            source.train.photos.pixels(place)
    out = prepared(photographs, tmp_path / "kept", *KEEP)  # as it is, and told when it is read
    with pytest.raises(ValueError, match=r"\w"):
        load_source(str(out)).train.photos.pixels(place)


# Staging


def test_a_pack_is_staged_once_and_checked(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 20_000)
    out = prepared(photographs, tmp_path / "pack", *KEEP)
    local = tmp_path / "local"
    source = load_source(str(out), stage=str(local))
    (copy,) = local.iterdir()
    assert content_of(copy) == content_of(out) and str(copy) in source.origin
    assert source.fingerprint == load_source(str(out)).fingerprint
    times = {path: path.stat().st_mtime_ns for path in copy.glob("*.bin")}
    assert torch.equal(seen(load_source(str(out), stage=str(local))), seen(source))
    (copy / "shard-00001.bin").write_bytes(b"half")
    load_source(str(out), stage=str(local))
    assert content_of(copy) == content_of(out)
    later = {path: path.stat().st_mtime_ns for path in times}
    assert {path.name for path in times if later[path] != times[path]} == {"shard-00001.bin"}

    def code(**words) -> str:
        with pytest.raises(UserError) as caught:
            load_source(words.pop("dataset", str(out)), **words)
        return caught.value.code

    assert code(dataset=str(photographs), stage=str(local)) == "nothing-to-stage"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
        assert code(stage=str(tmp_path / "small")) == "disk-full"
    (tmp_path / "file").write_text("")
    assert code(stage=str(tmp_path / "file")) == "output-unwritable"
    content = bytearray((out / "shard-00002.bin").read_bytes())
    content[5] ^= 1
    (out / "shard-00002.bin").write_bytes(content)
    assert code(stage=str(tmp_path / "new")) == "pack-damaged"


# Archives


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_webdataset_is_read_where_it_lies(photographs, tmp_path, kind):
    files = load_source(str(photographs))
    for split in ("train", "test"):
        part, content = getattr(files, split), {}
        for place, label in zip(part.places.tolist(), part.labels.tolist(), strict=True):
            name = part.photos.names[place]
            key = f"./{place:05}"
            content[key + Path(name).suffix] = (photographs / name).read_bytes()
            words = f"{label}\n" if kind == "cls" else f'{{"label": "{files.classes[label]}"}}'
            content[f"{key}.{kind}"] = words.encode()
        tar_of(tmp_path / "wds" / f"{split}-0000.tar", content)
    said = []
    source = load_source(str(tmp_path / "wds"), say=said.append)
    assert torch.equal(seen(source), seen(files)) and len(said) == 1
    assert source.train.labels.equal(files.train.labels)
    assert source.classes == (files.classes if kind == "json" else ("0", "1", "2"))
    out = prepared(tmp_path / "wds", tmp_path / "pack", *KEEP)
    assert load_source(str(out)).fingerprint == source.fingerprint
    assert torch.equal(seen(load_source(str(out))), seen(files))
    last = content.pop(f"{key}.{kind}")
    tar_of(tmp_path / "wds" / "test-0000.tar", content)
    assert code_of("stats", "--dataset", tmp_path / "wds") == "no-label"
    tar_of(tmp_path / "wds" / "test-0000.tar", {**content, f"{key}.{kind}": last})
    tar = tmp_path / "wds" / "train-0000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    assert code_of("stats", "--dataset", tmp_path / "wds") == "bad-archive"


@pytest.mark.parametrize("unpacked", [True, False])
def test_imagenet_is_read_as_it_is_published(photographs, tmp_path, unpacked):
    from scipy.io import savemat

    root = tmp_path / "imagenet"
    pictures = [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]
    synsets = {"n02012849": "crane, bird", "n03126707": "crane", "n01440764": "tench, Tinca"}
    inner = {}
    for number, synset in enumerate(synsets):
        part = {f"{synset}_{n}.JPEG": pictures[12 * number + n] for n in range(12)}
        inner[f"{synset}.tar"] = tar_of(tmp_path / "one.tar", part).read_bytes()
    tar_of(root / "ILSVRC2012_img_train.tar", inner)
    row = [("ILSVRC2012_ID", "i4"), ("WNID", object), ("words", object)]
    table = [(n, *pair) for n, pair in enumerate([*synsets.items(), ("n00001740", "entity")], 1)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(table, dtype=row)})
    answers, val = [3, 1, 2, 3], {}
    for number in range(1, 5):
        val[f"ILSVRC2012_val_{number:08}.JPEG"] = pictures[36 + number]
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "meta.mat", "ILSVRC2012_devkit_t12/data/meta.mat")
        (tmp_path / "truth").write_text("".join(f"{answer}\n" for answer in answers))
        tar.add(tmp_path / "truth", "x/data/ILSVRC2012_validation_ground_truth.txt")
    if unpacked:
        (root / "val").mkdir()
        for name, content in val.items():
            (root / "val" / name).write_bytes(content)
    else:
        tar_of(root / "ILSVRC2012_img_val.tar", dict(reversed(val.items())))
    source = load_source(str(root))
    assert source.classes == ("tench", "crane (n02012849)", "crane (n03126707)")
    assert source.test.labels.tolist() == [0, 1, 2, 0]
    assert source.train.labels.bincount().tolist() == [12, 12, 12]
    store, names = source.train.photos.store, source.train.photos.names
    for place in source.train.places.tolist():
        number = list(synsets).index(names[place][:9])
        nth = int(names[place].rpartition("_")[2][:-5])
        assert store.encoded(place) == pictures[12 * number + nth]
    assert [store.encoded(p) for p in source.test.places.tolist()] == list(val.values())
    out = prepared(root, tmp_path / "pack", "--short-side", "40")
    packed = load_source(str(out))
    assert packed.classes == source.classes and packed.test.labels.tolist() == [0, 1, 2, 0]
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert code_of("stats", "--dataset", root) == "imagenet-incomplete"
