"""Pictures with any number of classes: metrics against scikit-learn, sources, runs, sentences."""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launches import SMALL, Command, finish, rows, start, train
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from sklearn import metrics as theirs
from torch.nn import functional as F

from common.metric import METRICS, selectable
from config import HINTS, parse
from data.augment import Augment
from data.image_set import labels_in_words, numbered_as
from data.sources import load_source
from data.sources.many import multi_hot
from predict import load_run, made_by, predict, with_threshold
from report import page
from tasks import TASKS, Multilabel
from tasks.losses import Binary
from tasks.multilabel import steps

CLASSES = 6
NAMES = ("animal", "flies", "has wheels", "red")


def sample(n=301, classes=CLASSES, seed=0):
    """Logits, and labels of which a class has none and some pictures none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, classes, generator=generator) < torch.linspace(0.5, 0, classes)
    logits = torch.randn(n, classes, generator=generator) * 2 + labels * 1.5 - 1
    return logits, labels.to(torch.int8)


def counted(task, logits, labels, parts):
    counts = task.new_counts("cpu")
    for part in parts:
        task.count(counts, logits[part], labels[part], torch.ones(len(part), dtype=torch.int64))
    return counts


def whole(labels):
    return [torch.arange(len(labels))]


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_the_metrics_are_scikit_learns(threshold):
    logits, labels = sample()
    task = Multilabel(CLASSES, threshold=threshold)
    found = task.results(counted(task, logits, labels, whole(labels)))
    there = (labels.sum(0) > 0).nonzero().flatten().tolist()
    assert len(there) < CLASSES  # a class without pictures does not count
    said = logits.sigmoid() >= threshold
    rounded = (logits.clamp(-16, 16) * 2**11).round()
    ap = [theirs.average_precision_score(labels[:, c], rounded[:, c]) for c in there]
    exact = [theirs.average_precision_score(labels[:, c], logits[:, c]) for c in there]
    by_class = found["by_class"]
    assert [by_class["ap"][c] for c in there] == pytest.approx(ap, rel=1e-12)
    assert ap == pytest.approx(exact, abs=1e-3) and by_class["ap"][-1] is None
    assert found["mean_ap"] == pytest.approx(sum(ap) / len(ap), rel=1e-12)
    told = {"labels": there, "zero_division": 0}
    assert found["macro_f1"] == pytest.approx(
        theirs.f1_score(labels, said, average="macro", **told)
    )
    assert found["micro_f1"] == pytest.approx(theirs.f1_score(labels, said, average="micro"))
    assert found["exact_match"] == pytest.approx(theirs.accuracy_score(labels, said))
    each = theirs.precision_recall_fscore_support(labels, said, **told)
    for key, wanted in zip(("precision", "recall", "f1", "images"), each, strict=True):
        assert [by_class[key][c] for c in there] == pytest.approx(list(wanted))
    loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(1)
    assert found["loss"] == pytest.approx(float(loss.mean()), abs=1e-5)


def test_every_batching_and_spread_over_processes_comes_to_the_same_bits_and_padding_to_nothing():
    logits, labels = sample()
    logits[5], logits[6] = torch.nan, torch.inf
    task = Multilabel(CLASSES)
    counts = counted(task, logits, labels, whole(labels))
    for size in (1, 64, 100):
        order = torch.randperm(301, generator=torch.Generator().manual_seed(size))
        assert torch.equal(counted(task, logits, labels, order.split(size)), counts)
    halves = [counted(task, logits, labels, [part]) for part in torch.arange(301).split(151)]
    assert task.results(sum(halves)) == task.results(counts)
    padded = task.new_counts("cpu")
    task.count(padded, logits, labels, (torch.arange(301) < 100).long())
    assert torch.equal(padded, counted(task, logits, labels, [torch.arange(100)]))
    nothing = torch.zeros(9, CLASSES, dtype=torch.int8)  # pictures without any class
    empty = task.results(counted(task, logits[20:29], nothing, [torch.arange(9)]))
    assert empty["mean_ap"] == 0 and json.dumps(empty)


def test_of_many_classes_logits_are_ranked_more_coarsely_in_room_that_stays():
    assert steps(10) == steps(128) == 2**16 and steps(1000) == 2**13 and steps(100_000) == 256
    logits, labels = sample(50, 1000)
    task = Multilabel(1000)
    counts = counted(task, logits, labels, whole(labels))
    assert counts.numel() < 2**23 + 10_000
    ap = theirs.average_precision_score(labels[:, 3], (logits[:, 3].clamp(-16, 16) * 256).round())
    assert task.results(counts)["by_class"]["ap"][3] == pytest.approx(ap)


def test_the_surest_mistakes_are_kept_whatever_the_spread():
    logits, labels = sample()
    task, found = Multilabel(CLASSES), []
    for size, processes in ((301, 1), (7, 1), (64, 3)):
        kept = [task.new_examples("cpu") for _ in range(processes)]
        for number, part in enumerate(torch.arange(301).split(size)):
            weights = torch.ones(len(part), dtype=torch.int64)
            answers = task.count(task.new_counts("cpu"), logits[part], labels[part], weights)
            task.keep_examples(kept[number % processes], answers, labels[part], part)
        found.append(task.examples(torch.stack(kept)))
    assert found[0] == found[1] == found[2] and len(found[0]) == 32
    off = (logits.sigmoid() - labels).abs()
    order = off.amax(1).argsort(descending=True)[:32]
    assert [e["index"] for e in found[0]] == order.tolist()
    first = found[0][0]
    sure = float(logits[first["index"], first["class"]].sigmoid())
    assert first["confidence"] == pytest.approx(sure, abs=1e-5)
    word = {0: "also", 1: "not"}[first["label"]]
    assert task.caption(first, "a", list("abcdef")).startswith(
        f"a\n{word} {'abcdef'[first['class']]}"
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bce", "focal"])
def test_a_loss_is_its_formula_and_pictures_that_do_not_count_add_nothing(name, smoothing):
    logits, labels = sample()
    mixed = labels.float().flip(0).lerp(labels.float(), 0.3)
    for given in (labels, mixed):
        p, soft = logits.double().sigmoid(), given.double() * (1 - smoothing) + smoothing / 2
        power = 2 if name == "focal" else 0
        wanted = soft * (1 - p) ** power * p.log() + (1 - soft) * p**power * (1 - p).log()
        criterion = Binary(name, smoothing)
        assert float(criterion(logits, given)) == pytest.approx(-float(wanted.sum()), rel=1e-5)
        bad = given.clone()
        bad[100:] = -100  # as a photograph that cannot be decoded
        assert torch.allclose(criterion(logits, bad), criterion(logits[:100], given[:100]))
    assert Binary("cross_entropy").name == "bce" and Binary().total(labels) is None


def test_a_mixed_picture_has_the_mixture_of_both_rows_and_of_one_that_does_not_count_neither():
    augment = Augment("none", 8, (0.5,) * 3, (0.2,) * 3, 0, mixup=1.0)
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 0]], dtype=torch.int8)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    seen, targets = augment.mix(images, labels, torch.arange(4), 0, 3)
    share = float(seen[0, 0, 0, 0] / (0 - 3) + 1)  # of its own image: that of the reversed is 3
    assert torch.allclose(targets, labels.float() * share + labels.float().flip(0) * (1 - share))
    labels[0] = -100
    soft = augment.mix(images, labels, torch.arange(4), 0, 3)[1]
    assert ((soft < 0).any(1)).tolist() == [True, False, False, True]


# --- sources --------------------------------------------------------------------------------------


def pictures(folder, count=60, seed=0):
    """PNGs of noise, each with a stripe for each of its classes, and which those are."""
    (folder / "images").mkdir(parents=True)
    noise, found = np.random.default_rng(seed), []
    for number in range(count):
        pixels = noise.integers(0, 60, (8, 8, 3), dtype=np.uint8)
        has = noise.random(4) < 0.4
        for place in np.flatnonzero(has):
            pixels[2 * place : 2 * place + 2] += 180
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")
        names = [name for name, there in zip(NAMES, has, strict=True) if there]
        found.append((f"images/{number:03}.png", names))
    return found


def write(path, head, lines):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *lines])


def listed(folder, kind):
    found = pictures(folder)
    if kind == "columns":
        lines = [[file, *(int(name in has) for name in NAMES)] for file, has in found]
        write(folder / "labels.csv", ["file_name", *NAMES], lines)
    elif kind == "rows":  # one for each class of a picture
        lines = [(file, name) for file, has in found for name in has or [""]]
        write(folder / "metadata.csv", ["file_name", "label"], lines)
    elif kind == "jsonl":
        lines = [json.dumps({"file_name": file, "tags": has}) for file, has in found]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    else:
        write(folder / "labels.csv", ["image", "tags"], [(f, kind.join(has)) for f, has in found])
    return found


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


def truth(source, found):
    """Every picture's classes, as the files say."""
    sides = [(source.names["train"], source.train), (source.names["test"], source.test)]
    said = {}
    for names, part in sides:
        words = labels_in_words(part.labels, source.classes)
        said |= dict(zip(names, words, strict=True))
    return said == {file: "|".join(sorted(has)) for file, has in found} | {
        file: "|".join(n for n in source.classes if n in has) for file, has in found
    }


@pytest.mark.parametrize("kind", ["|", ";", ", ", "columns", "rows", "jsonl"])
def test_a_list_says_the_same_in_every_form(tmp_path, own_cache, kind):
    found = listed(tmp_path / "data", kind)
    source = multi_hot(load_source(str(tmp_path / "data"), many=True))
    assert source.task == "multilabel" and set(source.classes) == set(NAMES)
    assert source.train.labels.dtype == torch.int8
    assert len(source.train) + len(source.test) == 60 and truth(source, found)
    assert any("4 classes" in note and "have none" in note for note in source.notes)
    again = multi_hot(load_source(str(tmp_path / "data"), many=True))  # from the cache
    assert torch.equal(again.train.labels, source.train.labels)
    turned = numbered_as(source, source.classes[::-1])
    assert torch.equal(turned.train.labels, source.train.labels.flip(1))


def test_names_without_spaces_may_stand_between_spaces(tmp_path, own_cache):
    found = [(file, [n.replace(" ", "_") for n in has]) for file, has in pictures(tmp_path / "d")]
    write(tmp_path / "d" / "labels.csv", ["image", "tags"], [(f, " ".join(h)) for f, h in found])
    source = multi_hot(load_source(str(tmp_path / "d"), many=True))
    assert source.classes == ("animal", "flies", "has_wheels", "red") and truth(source, found)


@pytest.mark.parametrize("kind", ["names", "numbers", "text"])
def test_a_table_has_lists_of_names_or_of_numbers(tmp_path, own_cache, kind):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value
    from datasets import Image as Picture

    found = pictures(tmp_path / "d")
    order = ["red", "nobody", *NAMES[:3]]  # a class that no picture has is a class
    cells = [has for _, has in found]
    kinds = {"names": Sequence(Value("string")), "numbers": Sequence(ClassLabel(names=order))}
    if kind == "numbers":
        cells = [[order.index(name) for name in has] for has in cells]
    elif kind == "text":
        cells = ["|".join(has) or None for has in cells]
    features = Features({"image": Picture(), "labels": kinds.get(kind, Value("string"))})
    images = [str(tmp_path / "d" / file) for file, _ in found]
    data = Dataset.from_dict({"image": images, "labels": cells}, features=features)
    (tmp_path / "t").mkdir()
    data.to_parquet(tmp_path / "t" / "train-00000-of-00001.parquet")
    source = multi_hot(load_source(str(tmp_path / "t"), many=True))
    wanted = tuple(order) if kind == "numbers" else tuple(sorted(NAMES))
    assert source.classes == wanted
    each = sum(part.labels.sum(0, dtype=torch.int64) for part in (source.train, source.test))
    assert each.tolist() == [sum(name in has for _, has in found) for name in wanted]
    if kind == "numbers":
        assert any("no training picture" in note and "nobody" in note for note in source.notes)


def test_what_a_list_lacks_is_a_sentence(tmp_path, own_cache):
    def source(head, lines):
        write(tmp_path / "d" / "labels.csv", head, lines)
        return multi_hot(load_source(str(tmp_path / "d"), many=True))

    files = [file for file, _ in pictures(tmp_path / "d")]
    with refused("no-such-column", match="colour.*or a column of 0 and 1 for each class"):
        source(["image", "colour"], [(f, "dark") for f in files])
    with refused("no-label", match="gives no picture a class"):
        source(["image", "tags"], [(f, "") for f in files])
    with refused("bad-label", match=r"a\|b of .* has a \| in its name"):
        source(["image", "a|b", "c"], [(f, i % 2, 1) for i, f in enumerate(files)])
    split = [(f, "a;b" if i < 40 else "a;new", "train" if i < 40 else "test")
             for i, f in enumerate(files)]  # fmt: skip
    found = source(["image", "tags", "split"], split)
    assert any("no training picture that can be read is of class new" in n for n in found.notes)


def test_a_number_beyond_the_names_is_a_sentence(tmp_path, own_cache):
    import pyarrow
    import pyarrow.parquet

    blobs = [(tmp_path / "d" / f).read_bytes() for f, _ in pictures(tmp_path / "d", 4)]
    features = {"labels": {"feature": {"names": ["a", "b"], "_type": "ClassLabel"},
                           "_type": "Sequence"}}  # fmt: skip
    table = pyarrow.table({"image": blobs, "labels": [[0], [1], [], [0, 7]]})
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(told), tmp_path / "x.parquet")
    with refused("bad-label", match="row 3 of train .* a list of class names, or of the numbers"):
        load_source(str(tmp_path / "x.parquet"), many=True)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--task multilabel --class-weights balanced", "--class-weights: of pictures with one"),
        ("--task multilabel --sampler balanced", "--sampler: of pictures with one"),
        ("--task multilabel --loss cross_entropy", "bce or focal"),
        ("--task multilabel --select accuracy", "for multilabel: auto, loss, mean_ap"),
        ("--threshold 0.3", "--threshold: of --task multilabel"),
        ("--task multilabel --model linear_regression", "linear_regression is for regression"),
        ("--task many", "one of: auto, classification, multilabel"),
    ],
)
def test_what_makes_no_sense_of_many_labels_is_a_sentence(words, match):
    with pytest.raises(ValueError, match=match):
        parse(words.split())


def test_what_is_declared_is_counted_and_all_that_may_choose_can_be_named():
    answers, many = sample()
    labels = {"classification": many.argmax(1), "multilabel": many, "regression": many.float()}
    assert METRICS.keys() == TASKS.keys()
    for name, kind in TASKS.items():
        task, weights = kind(CLASSES), torch.ones(len(many), dtype=torch.int64)
        counts = task.new_counts(torch.device("cpu"))
        one = slice(0, 1) if name == "regression" else slice(None)
        targets = labels[name] if name == "classification" else labels[name][:, one]
        task.count(counts, answers[:, one], targets, weights)
        assert METRICS[name][0].key == "loss"
        assert {metric.key for metric in METRICS[name]} <= task.results(counts).keys()
        assert task.best_is in selectable(name)
    choices = HINTS["select"].metadata["choices"]
    assert set(choices) == {"auto"}.union(*map(selectable, METRICS))


def test_a_run_from_a_list_to_its_page_and_its_predictions(nets):
    found = listed(nets / "many", "|")
    flags = ["--dataset", "many", "--task", "multilabel", "--model", "full.py:Net", *SMALL]
    flags[flags.index("digits")] = "many"
    flags = [word for word in flags if word != "--no-plots"]
    flags += ["--batch-size", "12", "--augment", "none", "--lr", "0.003", "--epochs", "20"]
    done = train([*flags, "--run-dir", "labels"], nets)
    assert done.status == 0, done.out
    for words in ("test loss", "mAP 0.", "best 0.", "average precision", "all classes right",
                  "4 classes", "loss bce"):  # fmt: skip
        assert words in " ".join(done.out.split()), done.out
    run = nets / "labels"
    values = [row["test/mean_ap"] for row in rows(run) if "test/mean_ap" in row]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best/test/mean_ap"] == max(values) > 0.9, values
    assert (run / "mistakes.png").is_file() or summary["best/test/exact_match"] == 1
    assert (run / "samples.png").is_file() and not (run / "confusion.png").exists()
    made = page.build(run)
    assert ">average precision<" in made and "mAP on " in made and "Not shown" not in made
    model, told = load_run(run)
    told = with_threshold(told, None)
    asked = {f: predict(model, told, nets / "many" / f, None) for f, _ in found}
    answers = {f: {answer.name for answer in found_there} for f, found_there in asked.items()}
    assert sum(answers[file] == set(has) for file, has in found) > 45
    assert all(sure >= 0.999 for _, _, sure in predict(
        model, with_threshold(told, 0.999), nets / "many" / found[0][0], None))  # fmt: skip
    done = train(["--resume", "labels", "--eval-only", "--threshold", "0.01"], nets)
    assert done.status == 0 and f"mean_ap {max(values):.6g}" in done.out, done.out
    words = [str(nets / "many" / f) for f, has in found if not has][:2]
    from launches import REPOSITORY

    command = Command([REPOSITORY / "predict.py", *words, "--run", "labels", "--csv"])
    done = finish(*start(command, nets))
    assert done.status == 0 and all(word in done.out for word in words), done.out
    lower = ["--threshold", "0.01", "--epochs", "21", "--lr", "0", "--allow-change", "lr"]
    done = train(["--resume", "labels", *lower], nets)
    assert done.status == 0 and "measured on another threshold" in " ".join(done.out.split())
    assert load_run(run)[1]["threshold"] == 0.01  # of the same best weights


@pytest.mark.parametrize("top", [None, 2, 10**9])
def test_a_file_of_answers_can_tell_a_whole_picture_and_what_made_it(top):
    """At most so many rows are not so many rows: a csv could not be gone on with."""
    told = {"task": "multilabel", "threshold": 0.5, "classes": NAMES}
    given = {"run": Path("none"), "model": None, "weights": None, "tta": 0, "top": top}
    with refused("contradiction", match=r"ends in \.jsonl$"):
        made_by(argparse.Namespace(out=Path("x.csv"), **given), told)
    lines = argparse.Namespace(out=Path("x.jsonl"), **given)
    assert made_by(lines, told) == made_by(lines, dict(told))
    assert made_by(lines, told) != made_by(lines, {**told, "threshold": 0.9})


@pytest.mark.slow
def test_three_processes_are_one(nets):
    """On digits each picture has the one class that it has: many labels need no list."""
    flags = ["--model", "full.py:Net", *SMALL, "--task", "multilabel", "--batch-size", "60"]
    flags += ["--limit", "300", "--epochs", "2", "--shards", "3", "--cutmix", "1", "--bitwise"]
    for processes in (1, 3):
        done = train([*flags, "--run-dir", f"many-{processes}"], nets, processes)
        assert done.status == 0, done.out
    assert rows(nets / "many-1") == rows(nets / "many-3")
    one, three = (load_file(nets / f"many-{n}" / "model.safetensors") for n in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in one)
