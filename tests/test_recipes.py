"""Recipes: what they set, what they claim and who says so; each begins; far from it is told."""

import dataclasses
import io
import json
import re
from types import SimpleNamespace

import pytest
from launches import REPOSITORY, train
from refusals import refused
from rich.console import Console

from config import parse
from models import MODELS
from models.__main__ import table_of_models, table_of_recipes
from models.recipes import DIGITS, IMAGENET, RECIPES, NamedRecipe, in_markdown
from report.claim import far_from_claim, told_claim


def need_packages_of(name):
    if str(RECIPES[name].settings["model"]).startswith("timm:"):
        pytest.importorskip("timm")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_settings_that_are_understood_and_each_has_its_origin(name):
    need_packages_of(name)
    settings = parse(["--recipe", name])
    for field, value in RECIPES[name].settings.items():
        assert getattr(settings.config, field) == value, field
        assert settings.origin(field) == f"recipe {name}"
    assert settings.config.recipe == name and settings.origin("recipe") == "flag"


def test_a_recipe_stands_above_the_models_own_and_below_what_is_typed(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: cifar10-speednet\nlr: 0.2\nepochs: 5\n")
    settings = parse(["--config", str(file), "--epochs", "3"])
    found = {name: (getattr(settings.config, name), settings.origin(name)) for name in (
        "model", "tta", "lr", "epochs", "seed")}  # fmt: skip
    assert found == {
        "model": ("speednet", "recipe cifar10-speednet"), "tta": (2, "recipe cifar10-speednet"),
        "lr": (0.2, f"file {file}"), "epochs": (3, "flag"), "seed": (0, "default"),
    }  # fmt: skip
    other = parse(["--recipe", "cifar10-speednet", "--model", "vgg11"])
    assert other.config.model == "vgg11" and other.config.optimizer == "muon"
    assert other.origin("warmup") == "recipe cifar10-speednet" and other.config.warmup == 0.0
    names = list(other.layers)
    assert names.index("recipe") < names.index("recipe cifar10-speednet") < names.index("flag")
    plain = parse(["--model", "speednet"])
    assert plain.config.recipe == "none" and plain.origin("lr") == "recipe"


def test_a_run_keeps_its_recipe_and_another_one_is_refused(tmp_path):
    saved = {"recipe": "digits-my_cnn", **RECIPES["digits-my_cnn"].settings}
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    resumed = parse(["--resume", str(tmp_path)])
    assert resumed.config.recipe == "digits-my_cnn" and resumed.origin("lr") == "saved run"
    with refused("other-settings", match="--recipe cifar10-my_cnn .the run has digits-my_cnn"):
        parse(["--resume", str(tmp_path), "--recipe", "cifar10-my_cnn"])
    with refused("bad-value", match="did you mean cifar10-speednet"):
        parse(["--recipe", "cifar10-spednet"])


def test_who_says_what_is_never_left_open():
    for name, recipe in RECIPES.items():
        assert recipe.source and recipe.summary, name
        if recipe.ran:
            assert recipe.accuracy and recipe.runs and recipe.time and recipe.hardware, name
            assert recipe.sd or recipe.runs == 1, name
        else:
            assert "not run here" in recipe.claim and not recipe.runs and not recipe.sd, name
        if recipe.on == IMAGENET:
            assert not recipe.ran and recipe.lacks, name


def test_the_document_and_the_table_of_models_say_what_the_data_say():
    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- recipes: models/recipes.py -->\n\n(.*?)\n\n<!-- end -->", page, re.S)
    assert found and found[1] == in_markdown()
    assert table_of_recipes().row_count == len(RECIPES)


def data(on):
    train, test, classes = (range(size) for size in on)
    return SimpleNamespace(train=train, test=test, classes=list(classes))


def test_a_whole_run_far_from_its_claim_is_told_and_no_other(monkeypatch):
    name = "digits-my_cnn"
    recipe = NamedRecipe(
        settings=RECIPES[name].settings, summary="net", source="us", on=DIGITS, accuracy=0.9,
        sd=0.001, runs=3, time="1 s", hardware="a CPU", ran=True,
    )  # fmt: skip
    monkeypatch.setitem(RECIPES, name, recipe)
    config = parse(["--recipe", name]).config

    def told(accuracy, of=DIGITS, **other):
        changed = dataclasses.replace(config, **other)
        return far_from_claim(changed, data(of), {"accuracy": accuracy})

    assert told(0.905) == told(0.895) == ""
    assert "85.00 % of 355 test images, 5.0 points less than 90 % +- 0.1 (3 runs)" in told(0.85)
    assert "points more than" in told(0.95)
    assert told(0.1, (1000, 355, 10)) == ""  # other data, or a part of them
    for other in ({"epochs": 3}, {"max_steps": 9}, {"lr": 0.1}, {"recipe": "none"}):
        assert told(0.1, **other) == "", other
    assert told(0.85, seed=5, threads=2)  # what no recipe says changes no claim
    theirs = dataclasses.replace(recipe, ran=False, runs=0, sd=0.0, lacks="its blur")
    monkeypatch.setitem(RECIPES, name, theirs)
    assert told(0.885) == "" and "; it lacks its blur" in told(0.85)
    assert "90 %, its source says; not run here; lacks its blur" in told_claim(name)


def test_a_run_of_a_recipe_names_its_claim_and_keeps_it(tmp_path):
    flags = ["--recipe", "digits-my_cnn", "--seed", "7", "--threads", "1", "--no-plots"]
    done = train([*flags, "--run-dir", "kept"], tmp_path)
    words = " ".join(done.out.replace("│", " ").split())
    assert done.status == 0 and "far from" not in words, done.out
    assert f"digits-my_cnn: {RECIPES['digits-my_cnn'].summary}; claimed: " in words
    assert re.search(r"lr +0\.003 +\(recipe digits-my_cnn\)", words), done.out
    short = train([*flags, "--epochs", "1", "--run-dir", "short"], tmp_path)
    assert short.status == 0 and "far from" not in short.out, short.out


SMALLER = ["--dataset", "synthetic", "--limit", "8", "--batch-size", "4", "--image-size", "32"]
SMALLER += ["--eval-size", "0", "--eval-resize", "0", "--weights", "none", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_each_begins_on_little_data(tmp_path, name):
    need_packages_of(name)
    done = train(["--recipe", name, *SMALLER, "--dry-run"], tmp_path)
    assert done.status == 0 and "dry run: all is well" in done.out, done.out


def test_a_narrow_window_breaks_the_tables_but_no_name_that_is_to_be_typed():
    window = Console(width=80, file=io.StringIO())
    for table in (table_of_models(10), table_of_recipes()):
        window.print(table)
    shown = window.file.getvalue()
    assert all(f" {name} " in shown for name in (*MODELS, *RECIPES))
