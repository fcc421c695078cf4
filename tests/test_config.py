"""Settings: which layer wins, what is refused in which words, and how a batch is shared out."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from launches import REPOSITORY
from refusals import refused

import predict
from common.errors import UserError
from common.text import seconds
from config import (
    HINTS,
    MAY_CHANGE,
    TYPES,
    BatchPlan,
    Settings,
    TrainConfig,
    build_parser,
    parse,
    parse_or_exit,
    parse_to_train,
    plan_batch,
    to_json,
)
from models import MODELS
from training.plan import typed_in_vain

FIXED_FLAGS = [
    "--model",
    "--dataset",
    "--data-dir",
    "--run-dir",
    "--epochs",
    "--max-steps",
    "--batch-size",
    "--accumulate",
    "--lr",
    "--optimizer",
    "--weight-decay",
    "--momentum",
    "--schedule",
    "--warmup",
    "--image-size",
    "--augment",
    "--label-smoothing",
    "--grad-clip",
    "--ema",
    "--weights",
    "--freeze",
    "--mixed-precision",
    "--seed",
    "--log-every",
    "--val-fraction",
    "--eval-every",
    "--eval-only",
    "--track",
    "--resume",
    "--fresh",
    "--debug",
    "--dry-run",
    "--config",
    "--version",
]
LAUNCHER = re.compile("^(RANK|WORLD_SIZE|LOCAL_|SLURM_|TORCHELASTIC_|ACCELERATE_|LOCKSTEP_)")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch, tmp_path):
    for name in [name for name in os.environ if LAUNCHER.match(name)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def config(*words):
    return parse(list(words)).config


def yaml_file(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def saved_run(tmp_path, *words, name="old", **decided):
    """A run folder as a first life leaves it: config.json with what the machine decided on top."""
    folder = tmp_path / name
    folder.mkdir()
    settings = parse([*words, "--run-dir", str(folder)]).with_layer("batch plan", decided)
    (folder / "config.json").write_text(to_json(settings), encoding="utf-8")
    return str(folder)


# --- layers --------------------------------------------------------------------------------------


def test_a_restart_of_a_fresh_start_keeps_what_its_first_life_decided(tmp_path, monkeypatch):
    folder = saved_run(tmp_path, "--model", "resnet18", shards="8")
    words = ("--model", "resnet18", "--fresh", "--run-dir", folder)
    assert config(*words).shards == "auto"  # typed by a person: the old run is set aside
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert config(*words).shards == "8"  # typed again by SLURM: it is that run which goes on


def test_what_makes_no_run_takes_no_jobs_folder(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert config("--model", "resnet18").run_dir.endswith("slurm-7")
    for words in (("--eval-only", "--weights", "w.safetensors"), ("--find-lr",), ("--dry-run",)):
        assert config("--model", "resnet18", *words).run_dir is None


def test_each_layer_wins_over_the_one_below(tmp_path):
    assert TrainConfig().epochs == 10
    assert config("--model", "vgg11").epochs == MODELS["vgg11"].recipe["epochs"] == 30
    folder = saved_run(tmp_path, "--model", "vgg11", "--epochs", "7")
    assert config("--resume", folder).epochs == 7
    assert config("--resume", folder, "--debug").epochs == 1
    file = yaml_file(tmp_path, "epochs: 3\n")
    assert config("--resume", folder, "--debug", "--config", file).epochs == 3
    everything = parse(["--resume", folder, "--debug", "--config", file, "--epochs", "4"])
    assert everything.config.epochs == 4 and everything.config.model == "vgg11"
    names = list(everything.layers)
    assert names == ["recipe", "saved run", "--debug", f"file {file}", "flag"]


def test_each_value_knows_where_it_comes_from(tmp_path):
    file = yaml_file(tmp_path, "lr: 0.3\n")
    settings = parse(["--model", "vgg11", "--config", file, "--seed", "5", "--debug"])
    origins = {name: settings.origin(name) for name in ("keep", "warmup", "limit", "lr", "seed")}
    assert origins == {
        "keep": "default", "warmup": "recipe", "limit": "--debug", "lr": f"file {file}",
        "seed": "flag",
    }  # fmt: skip
    asked = [name for name in HINTS if settings.asked(name)]
    assert sorted(asked) == ["lr", "model", "seed"]


def test_a_layer_that_the_program_decides_goes_below_what_was_typed():
    settings = parse(["--model", "vgg11", "--augment", "crop"])
    settings = settings.with_layer("data set", {"augment": "none", "cutout": 4}, before="flag")
    assert (settings.config.augment, settings.config.cutout) == ("crop", 4)
    assert settings.with_layer("plan", {"augment": "flip"}).config.augment == "flip"


def test_weights_bring_the_fine_tuning_recipe_and_typed_values_stay():
    tuned = config("--model", "vgg11", "--weights", "imagenet", "--epochs", "9")
    assert (tuned.lr, tuned.image_size, tuned.epochs) == (0.005, 224, 9)


def test_both_spellings_and_an_equals_sign_mean_the_same():
    ways = (
        ["--batch-size", "8"], ["--batch_size", "8"], ["--batch-size=8"], ["--batch_size=8"]
    )  # fmt: skip
    assert {config(*way).batch_size for way in ways} == {8}
    assert config("--run-dir=a_b--c").run_dir == "a_b--c"
    assert config("--no_plots").plots is config("--no-plots").plots is False


def test_every_field_has_a_flag_and_every_recipe_only_fields_and_possible_values():
    flags = [s for action in build_parser()._actions for s in action.option_strings]
    assert {"--" + name.replace("_", "-") for name in HINTS} <= set(flags)
    assert set(FIXED_FLAGS) <= set(flags)
    for name, entry in MODELS.items():
        for values in (entry.recipe, entry.recipe | entry.finetune):
            assert set(values) <= set(HINTS), name
            words = [w for k, v in values.items() for w in (f"--{k}", str(v)) if v is not True]
            config("--model", name, *words)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--modle alexnet", r"--modle: no such option \(did you mean --model\?\)"),
        ("--batch_sise=4", r"--batch-sise: no such option \(did you mean --batch-size\?\)"),
        ("--mod alexnet", "--mod: no such option"),
        ("--optimizer adam", r"--optimizer adam: not known \(did you mean adamw\?\); one of: sgd,"),
        ("--model alexnte", r"no such model \(did you mean alexnet\?\); known: linear_regression"),
        ("--resume x --allow-change batch-sise", r"not a setting \(did you mean batch_size\?\)"),
        ("--lr fast", "--lr 'fast': must be a number"),
        ("--lr nan", "must be a number"),
        ("--lr inf", "must be a number"),
        ("--epochs 1.5", "--epochs '1.5': must be a whole number"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--label-smoothing 1", "must be at most 0.999"),
        ("--keep 1", "--keep 1: must be at least 2"),
        ("--model alexnet --image-size 32", "--image-size 32: alexnet needs at least 63"),
        ("--max-time soon", "--max-time soon: not a length of time; write 3h50m"),
        ("--checkpoint-every often", "--checkpoint-every often: not a length of time"),
        ("--checkpoint-every 0", "must be at least 1 step"),
        ("--shards 0", "must be auto or a whole number from 1"),
        ("--shards two", "must be auto or a whole number from 1"),
        ("--augment crop|flp", "'flp' is not a step .did you mean flip"),
        ("--augment crop|flip(0.2) --alternating-flip", "write flip without a probability"),
        ("alexnet", "alexnet: not an option; every option starts with --; type --model alexnet"),
        ("my.py:Net 3", "my.py:Net 3: not an option; .*; type --model my.py:Net$"),
        ("digits", "type --dataset digits$"),
        ("help", "type python train.py --help$"),
        ("nothing", "nothing: not an option; every option starts with --$"),
        ("--list-models", "; python -m models prints them;"),
        ("--arch x", "; type --model;"),
        ("--logdir x", "; type --run-dir;"),
        ("--gpu 0", "CUDA_VISIBLE_DEVICES chooses"),
        ("--local-rank=0", "leave it out"),
        ("--ema-decay .9", "; type --ema;"),
        ("--test", "type --eval-only --resume"),
        ("--config nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("--model nowhere.py:Net", "nowhere.py"),
    ],
)
def test_what_is_wrong_is_told_with_what_would_work(words, told):
    with pytest.raises(UserError, match=told):
        parse(words.split())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nets:Net", "did you mean nets.py:Net?"),
        ("nets.Net", "did you mean nets.py:Net?"),
        ("parts.inner.Net", "did you mean parts/inner.py:Net?"),
        ("parts/inner", "did you mean parts/inner.py:ClassName?"),
        ("nets", "did you mean nets.py:ClassName?"),
        ("parts", "type parts/FILE.py:ClassName"),
        ("nots.Net", "nots.Net: no such model; known"),
    ],
)
def test_a_file_that_an_import_would_name_is_what_was_meant(tmp_path, monkeypatch, name, told):
    (tmp_path / "parts").mkdir()
    for file in ("nets.py", "parts/inner.py"):
        (tmp_path / file).write_text("class Net: pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        parse(["--model", name])
    assert told in str(caught.value)


def test_all_problems_are_reported_together(tmp_path):
    file = yaml_file(tmp_path, "sead: 1\nepochs: many\n")
    with pytest.raises(UserError) as caught:
        parse(["--modle", "x", "--lr", "fast", "--optimizer", "adma", "--config", file])
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert any("sead: no such setting (did you mean seed?)" in line for line in lines)
    assert any("epochs 'many': must be a whole number" in line for line in lines)
    with pytest.raises(UserError) as caught:
        parse(["--shards", "x", "--max-time", "soon", "--checkpoint-every", "often"])
    assert len(str(caught.value).splitlines()) == 3


def test_an_unknown_model_is_reported_together_with_the_other_problems():
    with pytest.raises(UserError) as caught:
        parse(["--model", "alexnte", "--lr", "fast"])
    assert "did you mean alexnet?" in str(caught.value)
    assert "--lr 'fast': must be a number" in str(caught.value)


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x00"])
@pytest.mark.parametrize("flag", ["--model", "--dataset", "--run-dir"])
def test_control_characters_in_names_are_refused(flag, character):
    with pytest.raises(UserError, match="must be text"):
        parse([flag, f"a{character}b"])


@pytest.mark.parametrize("flag", ["--model", "--dataset", "--run-dir"])
def test_an_empty_text_is_refused_with_where_it_may_come_from(flag):
    with refused("bad-value", match=f"{flag} '': is empty .an unset variable"):
        parse([flag, ""])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lr 0", "--lr 0 changes no weight; --find-lr suggests"),
        ("--fresh", "no effect: --fresh; without --run-dir"),
        ("--lr 0 --eval-only --weights w", ""),
        ("--fresh --run-dir r", ""),
        ("", ""),
    ],
)
def test_what_is_typed_and_changes_nothing_is_told(words, told):
    found = typed_in_vain(parse(words.split()))
    assert (told in found[0] and len(found) == 1) if told else not found


@pytest.mark.parametrize("flag", ["--shards", "--checkpoint-every"])
def test_digits_that_are_no_number_are_refused(flag):
    with pytest.raises(UserError):
        parse([flag, "²"])  # "²".isdigit() is true, int("²") fails


# --- YAML ----------------------------------------------------------------------------------------


def test_yaml_gives_values_of_every_kind(tmp_path):
    file = yaml_file(
        tmp_path, "lr: 1e-3\nbatch-size: 32\ncompile: true\nmodel: vgg11\nmax_time: null\n"
    )
    settings = parse(["--config", file])
    c = settings.config
    assert (c.lr, c.batch_size, c.compile, c.model, c.max_time) == (0.001, 32, True, "vgg11", None)
    assert settings.origin("warmup") == "recipe" and c.warmup == 1.0  # of vgg11, from the file
    assert config("--config", yaml_file(tmp_path, "# nothing\n")) == config()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 1\nlr: 2\n", "lr stands there twice"),
        ("batch-size: 8\nbatch_size: 16\n", "batch_size stands there twice"),
        ("learning_rate: 1\n", "no such setting"),
        ("- lr\n- 1\n", "must be lines like"),
        ("just words\n", "must be lines like"),
        ("1: 2\n", "must be lines like"),
        ("[a]: 1\n", "must be lines like|not valid YAML"),
        ("lr: {a: 1}\n", "must be a number"),
        ("dataset: [cifar10]\n", "must be text"),
        ("dataset: null\n", "must be text"),
        ("dataset: true\n", "must be text"),
        ("epochs: true\n", "must be a whole number"),
        ("epochs: 2.5\n", "must be a whole number"),
        ("plots: 1\n", "must be true or false"),
        ("lr: !!python/object/apply:os.system ['touch planted']\n", "not valid YAML at line 1"),
        ("lr: !!python/name:os.system\n", "not valid YAML at line 1"),
        ("lr: [1\n", "not valid YAML"),
        ("lr: 1\n---\nlr: 2\n", "not valid YAML"),
        ("debug: true\n", "no such setting"),
    ],
)
def test_yaml_that_is_no_flat_table_of_known_settings_is_refused(tmp_path, text, told):
    with pytest.raises(UserError, match=told):
        parse(["--config", yaml_file(tmp_path, text)])
    assert not (tmp_path / "planted").exists()


def test_auto_on_the_command_line_undoes_the_value_of_a_file(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("shards: '4'\nweights: none\n")
    config = parse(["--config", str(file), "--shards", "auto"]).config
    assert (config.shards, config.weights) == ("auto", "none")


def test_a_clock_time_in_yaml_means_what_it_means_as_a_flag(tmp_path):
    """YAML 1.1 reads 1:30:00 as the number 5400, and 1:30 as 90 (steps?)."""
    c = config("--config", yaml_file(tmp_path, "max_time: 1:30:00\ncheckpoint_every: 1:30\n"))
    assert seconds(c.max_time) == 5400
    assert not c.checkpoint_every.isdigit() and seconds(c.checkpoint_every) == 90


# --- resuming ------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_settings_and_lists_what_was_typed_otherwise(tmp_path):
    folder = saved_run(tmp_path, "--model", "vgg11", "--lr", "0.2")
    for words in (["--resume", folder], ["--run-dir", folder]):
        assert config(*words).lr == 0.2 and config(*words).model == "vgg11"
        with pytest.raises(UserError) as caught:
            parse([*words, "--lr", "0.3", "--batch-size", "8", "--epochs", "99"])
        told = str(caught.value)
        assert "--lr 0.3 (the run has 0.2)" in told and "--batch-size 8 (the run has 64)" in told
        assert "--allow-change batch-size lr" in told and "epochs" not in told
        allowed = [*words, "--lr", "0.3", "--batch-size", "8", "--allow-change", "lr", "batch-size"]
        assert (config(*allowed).lr, config(*allowed).batch_size) == (0.3, 8)
        assert config(*words, "--lr", "0.2").lr == 0.2  # typing the same is no conflict


def test_what_may_change_may_change(tmp_path):
    folder = saved_run(tmp_path)
    for name in MAY_CHANGE - {"run_dir", "track", "plots", "tta", "select", "skip_bad_images",
                             "threshold"}:  # fmt: skip
        text = TYPES[name] in (str, str | None)
        parse(["--resume", folder, f"--{name}", "9m" if text else "7"])
    parse(["--resume", folder, "--select", "loss"])
    many = saved_run(tmp_path, "--task", "multilabel", name="many")
    assert config("--resume", many, "--threshold", "0.3").threshold == 0.3
    parse(
        [
            "--resume",
            folder,
            "--no-plots",
            "--track",
            "tensorboard",
            "--tta",
            "1",
            "--skip-bad-images",
        ]
    )


def test_a_changed_yaml_file_is_a_conflict_too(tmp_path):
    folder = saved_run(tmp_path, "--lr", "0.2")
    with pytest.raises(UserError, match=r"--lr 0.4 \(the run has 0.2\)"):
        parse(["--resume", folder, "--config", yaml_file(tmp_path, "lr: 0.4\n")])


def test_fresh_ignores_what_stood_there(tmp_path):
    folder = saved_run(tmp_path, "--lr", "0.2")
    assert config("--run-dir", folder, "--fresh", "--lr", "0.3").lr == 0.3
    with pytest.raises(UserError, match="contradict"):
        parse(["--resume", folder, "--fresh"])


@pytest.mark.parametrize(
    ("words", "decided"),
    [
        (["--batch-size", "5000"], {"batch_size": 1437}),  # lowered to what the data set has
        (["--threads", "0"], {"threads": 2}),  # 0: the machine's own number
    ],
)
def test_the_same_command_goes_on_where_the_first_life_decided_a_value(tmp_path, words, decided):
    folder = saved_run(tmp_path, *words, **decided)
    again = parse([*words, "--run-dir", folder])
    assert {name: getattr(again.config, name) for name in decided} == decided


def test_a_run_of_an_older_program_goes_on_without_a_setting_that_is_no_more(tmp_path):
    folder = saved_run(tmp_path, "--model", "vgg11")
    before = parse(["--resume", folder])
    path = tmp_path / "old" / "config.json"
    content = json.loads(path.read_text())
    content["config"]["num_workers"] = content["asked"]["num_workers"] = 4
    path.write_text(json.dumps(content))
    assert parse(["--resume", folder]) == before


def test_resuming_what_is_not_there_names_what_is(tmp_path):
    saved_run(tmp_path, name="alexnet-digits-1")
    with pytest.raises(UserError, match=r"holds no run \(did you mean .*alexnet-digits-1\?\)"):
        parse(["--resume", str(tmp_path / "alexnet-digits")])
    with pytest.raises(UserError, match=r"runs/latest: holds no run.*has a config.json"):
        parse(["--resume"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"config": [1]}', '{"config": 3}']
    + [f'{{"config": {{{pair}}}}}' for pair in ('"model": null', '"image_size": "x"', '"lr": []')],
)
def test_a_damaged_config_file_is_a_sentence(tmp_path, text):
    folder = saved_run(tmp_path)
    (tmp_path / "old" / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read; mend it, or start over with --fresh"):
        parse(["--resume", folder])


def test_a_run_folder_in_the_home_is_meant_also_where_no_shell_puts_it_in(tmp_path, monkeypatch):
    """A folder named ~ was made beside the program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["--run-dir=~/runs/new"]).config.run_dir == f"{tmp_path}/runs/new"
    with refused("no-run", match=f"--resume {tmp_path}/runs/old"):
        parse(["--resume=~/runs/old"])


def test_resume_and_another_run_dir_contradict_each_other(tmp_path):
    folder = saved_run(tmp_path)
    with pytest.raises(UserError, match="--run-dir"):
        parse(["--resume", folder, "--run-dir", str(tmp_path / "elsewhere")])


def test_lives_of_one_job_or_one_restarting_launcher_share_a_folder(monkeypatch):
    assert config().run_dir is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a/b")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert config().run_dir == os.path.join("runs", "launch-a_b")  # noqa: PTH118
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(UserError, match="add --run-dir"):  # each life would begin anew
        config()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert config().run_dir.endswith("slurm-7")
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    monkeypatch.setenv("SLURM_PTY_PORT", "1")  # a person's shell on a node: one folder a command
    assert config().run_dir is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert config().run_dir.endswith("slurm-5_3")
    assert config("--run-dir", "mine").run_dir == "mine"
    assert config("--debug").run_dir is None


# --- lengths of time and batches -----------------------------------------------------------------


def test_lengths_of_time():
    right = {"3h50m": 13800, "90s": 90, "1d": 86400, "1:30:00": 5400, "1:30": 90, "1d2h3m4s": 93784}
    assert {text: seconds(text) for text in right} == right
    for text in ("", "0s", "0:00", "90", "5 m", "m", "1h1h", "-5m", "1:2:3:4", "5m3h", "1.5h"):
        with pytest.raises(UserError, match="not a length of time"):
            seconds(text)


def test_every_plan_that_is_possible_is_the_equation_it_claims():
    for shards in ("auto", "1", "4", "6", "24"):
        for accumulate in (1, 2, 3):
            for batch in (1, 7, 64, 100, 128, 5000):
                for processes in (1, 2, 3, 4, 8):
                    for images in (1, 5, 63, 1437):
                        _check_plan(shards, accumulate, batch, processes, images)


def _check_plan(shards, accumulate, batch, processes, images):
    values = {"shards": shards, "accumulate": accumulate}
    settings = Settings({"recipe": {**values, "batch_size": batch}})
    wanted = processes * accumulate if shards == "auto" else int(shards)
    try:
        plan = plan_batch(settings, processes, images)
    except UserError:
        assert wanted < processes or images < wanted, values
        return
    assert plan.shards == wanted and plan.batch_size % plan.shards == 0
    assert plan.batch_size == sum(plan.shares) * plan.micro_batch_size
    assert plan.micro_batch_size >= 1 and plan.batch_size <= images
    assert abs(plan.batch_size - batch) < plan.shards or images < batch + plan.shards
    assert bool(plan.note) == (plan.batch_size != batch)


def test_a_recipes_batch_is_rounded_and_a_typed_one_is_refused_with_the_nearest():
    plan = plan_batch(parse(["--model", "vgg11"]), 3, 1000)
    assert plan.batch_size == 63
    assert plan.note == "batch 64 of the recipe rounded to 63, which 3 shards divide"
    with pytest.raises(UserError, match=r"--batch-size 64 .* 3 shards .*63 and 66 do"):
        plan_batch(parse(["--batch-size", "64"]), 3, 1000)
    with pytest.raises(UserError, match=r"--batch-size 2 .* 4 shards .*; 4 does"):
        plan_batch(parse(["--batch-size", "2", "--accumulate", "4"]), 1, 1000)


@pytest.mark.parametrize("shards", [1, 2, 4, 6, 12])
def test_shards_are_spread_over_any_number_of_processes_up_to_their_own(shards):
    for processes in range(1, shards + 1):
        plan = BatchPlan(shards * 3, shards, processes)
        mine = [plan.shards_of(rank) for rank in range(processes)]
        assert [n for part in mine for n in range(part.start, part.stop)] == list(range(shards))
        assert max(plan.shares) - min(plan.shares) <= 1 and min(plan.shares) >= 1
        assert plan.used == shards / (processes * max(plan.shares))
    with pytest.raises(UserError, match=f"{shards + 1} processes cannot share {shards} shard") as e:
        plan_batch(parse(["--shards", str(shards)]), shards + 1, 1000)
    assert e.value.code == "too-few-shards"


def test_uneven_shares_say_what_they_cost_and_which_number_of_processes_does_better():
    assert BatchPlan(64, 4, 2).in_words() == "64 = 2 processes x 2 shards x 16 images"
    assert BatchPlan(60, 12, 5).in_words() == (
        "60 = 12 shards x 5 images, 3 or 2 on each of 5 processes: 80 % of their time is used; "
        "4 are as fast, 6 are faster"
    )
    assert BatchPlan(60, 5, 3).in_words().endswith("83 % of their time is used; 5 are faster")


def test_a_data_set_smaller_than_a_batch_lowers_it_and_an_impossible_one_is_refused():
    plan = plan_batch(parse(["--batch-size", "64"]), 2, 51)
    assert (plan.batch_size, plan.micro_batch_size) == (50, 25)
    assert plan.note == "batch 64 lowered to 50: there are only 51 training images"
    with pytest.raises(UserError, match="3 training images are fewer than the 8 shards"):
        plan_batch(parse(["--batch-size", "64"]), 8, 3)


# --- the command line as a process ---------------------------------------------------------------


def run(*words, cwd, **environment):
    """A real process for which torch cannot be imported: what it does needs none."""
    poison = cwd / "poison"
    poison.mkdir(exist_ok=True)
    for name in ("torch", "rich", "accelerate", "torchvision"):
        (poison / f"{name}.py").write_text("raise SystemExit('a heavy import')")
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(poison), **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [["--modle", "x"], ["--lr"], ["--debug=1"], ["--model", "alexnte"]]
)
def test_a_typo_is_one_sentence_from_rank_0_only_and_status_2(tmp_path, words):
    first = run("train.py", *words, cwd=tmp_path, RANK="0")
    second = run("train.py", *words, cwd=tmp_path, RANK="1", LOCAL_RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert words[0].partition("=")[0] in first.stderr and first.stdout == ""
    assert "Traceback" not in first.stderr and len(first.stderr.strip().splitlines()) == 1
    assert (second.stdout, second.stderr) == ("", "")


def test_help_and_version_need_no_heavy_import(tmp_path):
    done = run("train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(flag in done.stdout for flag in FIXED_FLAGS)
    assert run("train.py", "--version", cwd=tmp_path).stdout.startswith("lockstep ")
    words = done.stdout.split()  # nothing that is typed is broken where a line ends
    choices = [str(c) for f in HINTS.values() for c in f.metadata["choices"]]
    assert not [c for c in choices if not {c, f"[{c}", f"{c}]"} & {*words}]
    assert "0: off (default 0)" in " ".join(words)


def test_the_module_prints_each_value_with_its_origin(tmp_path):
    done = run("-m", "config", "--model", "vgg11", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert set(lines) == set(HINTS)
    assert lines["seed"] == ["3", "flag"] and lines["lr"] == ["0.0003", "recipe"]
    assert lines["keep"] == ["3", "default"]
    assert run("-m", "config", "--sead", "3", cwd=tmp_path).returncode == 2


def test_torchrun_hands_every_option_of_ours_to_the_script():
    from torch.distributed.run import get_args_parser

    flags = [s for action in build_parser()._actions for s in action.option_strings]
    for flag in [f for f in flags if f.startswith("--")]:
        for words in ([flag, "1"], [f"{flag}=1"], [flag.replace("-", "_").replace("__", "--", 1)]):
            parsed = get_args_parser().parse_args(["--nproc-per-node", "2", "train.py", *words])
            assert parsed.training_script_args == words
    # A flag that stands before the script must not be taken for one of torchrun's either.
    theirs = [s for action in get_args_parser()._actions for s in action.option_strings]
    for flag in set(flags) - {"--help", "-h"}:
        assert not [o for o in theirs if o.replace("_", "-").startswith(flag)], flag


def test_what_is_saved_reads_back_as_the_same_settings(tmp_path):
    folder = saved_run(tmp_path, "--model", "speednet", "--max-time", "2h", "--track", "wandb")
    first = parse(["--model", "speednet", "--max-time", "2h", "--track", "wandb"]).config
    again = config("--resume", folder)
    for name in set(HINTS) - {"run_dir"}:
        assert getattr(again, name) == getattr(first, name), name
    origins = json.loads((tmp_path / "old" / "config.json").read_text())["origins"]
    assert origins["lr"] == "recipe" and origins["track"] == "flag"


def test_words_that_yaml_turns_into_switches_mean_what_stands_there(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("mixed_precision: no\nlr: 1e-3\ncompile: yes\nplots: off\nbitwise: True\n")
    found = config("--config", str(file))
    assert (found.mixed_precision, found.lr, found.compile) == ("no", 1e-3, True)
    assert found.plots is False and found.bitwise is True


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--criterion", "--loss"), ("--early_stopping", "--patience"),
        ("--learning_rate", "--lr"), ("--device", "CUDA_VISIBLE_DEVICES"),
        ("--batchsize", "--batch-size"),
    ],
)  # fmt: skip
def test_a_flag_of_another_program_is_answered_by_its_meaning(flag, says, tmp_path):
    with pytest.raises(UserError, match=says):
        parse([flag, "3"])
    (tmp_path / "a.yaml").write_text(f"{flag[2:]}: 3\n")
    with pytest.raises(UserError, match=says.replace("--", "").replace("-", "[-_]")):
        parse(["--config", str(tmp_path / "a.yaml")])


def test_a_python_without_the_packages_gets_the_line_that_installs_them(monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "common.parser.find_spec", lambda name: None if name == "torch" else there(name)
    )
    with pytest.raises(SystemExit) as ended:
        parse_or_exit(["--debug"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "lacks torch" in said and "-m pip install -e" in said
    assert predict.main(["x.png"]) == 2 and "lacks torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["data stats", "models", "report list", "config", "export runs/x --to onnx"]
)
def test_no_command_answers_a_python_without_packages_with_a_traceback(command):
    words = [sys.executable, "-S", "-m", *command.split()]  # -S: without site-packages
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert ended.returncode == 2 and "-m pip install -e" in ended.stderr
    assert "lacks torch" in ended.stderr and "Traceback" not in ended.stderr


def test_a_run_shows_a_sign_of_life_before_torch_is_loaded_once_for_all_processes(
    monkeypatch, capsys
):
    parse_to_train(["--debug"])
    assert "loading torch" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    parse_to_train(["--debug"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", ["", "--weights none"])
def test_an_evaluation_of_nothing_is_refused_before_data_are_looked_for(words):
    with refused("nothing-to-evaluate", match="--resume runs/NAME, or --weights FILE"):
        parse(["--model", "my_cnn", "--eval-only", *words.split()])
