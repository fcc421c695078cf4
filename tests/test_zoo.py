"""The zoos of torchvision and timm: names, sizes, heads, weights from files, normalisation."""

import json
import shutil
import sys

import pytest
import torch
from launches import REPOSITORY, SMALL, python, rows, same_after_a_kill, train
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models as zoo

from common.errors import UserError
from models import build_model, card_of_weights, looks, lookup
from models.weights import freeze_backbone, head_prefixes, imagenet_reach, load_weights

timm = pytest.importorskip("timm")
CLASSIFIERS = zoo.list_models(module=zoo)
DIGITS = ["--dataset", "digits", "--image-size", "32", "--limit", "120", "--batch-size", "40"]
DIGITS += ["--threads", "1", "--log-every", "1", "--no-plots", "--shards", "2"]
STEPPED = (
    "torchvision:mobilenet_v3_small", "torchvision:regnet_x_400mf",
    "torchvision:mnasnet0_5", "timm:test_resnet", "timm:test_vit",
    "timm:test_convnext", "timm:test_efficientnet", "timm:test_nfnet", "timm:test_mambaout",
)  # fmt: skip


# Every name builds


@pytest.fixture
def numbers_while_it_is_built(monkeypatch):
    """regnet reads numbers of tensors to know its widths, which a meta tensor has not."""
    from torchvision.models.regnet import BlockParams

    make = BlockParams.from_init_params.__func__

    def on_cpu(cls, *given, **more):
        with torch.device("cpu"):
            return make(cls, *given, **more)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_cpu))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_of_torchvision_sees_the_smallest_images_it_is_said_to(
    name, numbers_while_it_is_built
):
    name = f"torchvision:{name}"
    entry = lookup(name)
    size = -(-max(32, entry.min_image_size) // entry.multiple_of) * entry.multiple_of
    with torch.device("meta"):
        model = build_model(name, num_classes=7, image_size=size)
        answer = model.eval()(torch.zeros(2, 3, size, size))
    assert answer.shape == (2, 7)
    for wrong in {entry.min_image_size - 1, entry.multiple_of * 3 + 1} - {0}:
        if wrong < entry.min_image_size or wrong % entry.multiple_of:
            with pytest.raises(UserError, match=r"type --image-size \d+"):
                build_model(name, num_classes=7, image_size=wrong)


@pytest.mark.parametrize("name", STEPPED)
def test_a_model_of_the_zoos_learns_a_batch(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=4, image_size=32).train()
    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[3:]) < losses[0]
    heads = head_prefixes(model, name, 32)
    assert all(model.state_dict()[f"{head}weight"].shape[0] == 4 for head in heads)
    freeze_backbone(model, name, 32)
    training = [k for k, p in model.named_parameters() if p.requires_grad]
    assert training and all(k.startswith(heads) for k in training)


# Names and sizes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:resnt50", r"no model of that name \(did you mean \w*resn\w*\?\)"),
        ("timm:test_vit.r160", r"no weights r160 of test_vit \(did you mean r160_in1k\?\)"),
    ],
)
def test_a_wrong_name_of_timm_is_answered_with_what_would_work(name, says):
    with pytest.raises(UserError, match=says):
        lookup(name)


def test_a_model_of_timm_without_classes_is_none():
    from timm.models import get_pretrained_cfg

    configs = {name: get_pretrained_cfg(name) for name in timm.list_models()}
    bare = [name for name, found in configs.items() if not (found and found.classifier)]
    assert len(bare) < len(configs) / 10
    for name in bare[:2]:
        with pytest.raises(UserError, match="no layer that classifies"):
            lookup(f"timm:{name}")


def test_without_timm_the_sentence_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs the package timm .*type: pip install timm"):
        lookup("timm:test_byobnet")


def test_a_size_that_a_shape_cannot_have_is_answered_with_its_own():
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r"cannot be built for images of 100 pixels .*-size 224"),
    ):
        build_model("timm:nest_tiny", num_classes=3, image_size=100)
    model = build_model("timm:test_vit", num_classes=3, image_size=64)  # 160 is its own
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    done = python("-m", "models", "timm:test_maxvit", "--image-size", "100")
    assert done.returncode == 2 and "its own is 160" in done.stderr, done.stderr


def test_the_list_and_the_page_of_a_model():
    done = python("-m", "models", "timm:test_v*")
    assert done.stdout.split()[:2] == ["timm:test_vit", "timm:test_vit2"]
    assert "torchvision:vit_b_16" in python("-m", "models", "torchvision:").stdout.split()
    said = python("-m", "models", "timm:test_vit").stdout
    assert "r160_in1k" in said and "bicubic" in said and "95.0 % of a side" in said


# Weights


def in_hub_layout(folder, name, size, classes=1000, **said):
    """The folder of a hub repository: config.json and model.safetensors; the model in it."""
    torch.manual_seed(1)
    model = build_model(f"timm:{name}", num_classes=classes, image_size=size)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.2, 0.25], "crop_pct": 0.9, **said}
    (folder / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": cfg}))
    return model


def test_a_file_of_timm_fits_other_sizes_and_other_classes(tmp_path):
    published = in_hub_layout(tmp_path / "hub", "test_vit", 160)
    file = str(tmp_path / "hub" / "model.safetensors")
    torch.manual_seed(0)
    model = build_model("timm:test_vit", num_classes=5, image_size=64)
    torch.manual_seed(0)
    fresh = build_model("timm:test_vit", num_classes=5, image_size=64)
    before = torch.get_rng_state()
    said = load_weights(model, "timm:test_vit", file, 5, image_size=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert "they know 1,000 classes, so the head for 5 is new (head)" in said, said
    assert torch.equal(model.blocks[1].mlp.fc1.weight, published.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.head.weight, fresh.head.weight)
    resampled = timm.layers.resample_abs_pos_embed(published.pos_embed, [4, 4])
    assert torch.allclose(model.pos_embed, resampled) and model.pos_embed.shape[1] == 17
    wrong = build_model("timm:test_resnet", num_classes=5, image_size=64)
    with pytest.raises(UserError, match="do not fit --model timm:test_resnet"):
        load_weights(wrong, "timm:test_resnet", file, 5, image_size=64)


def test_weights_without_a_head_get_one(tmp_path):
    in_hub_layout(tmp_path / "hub", "test_vit", 64, classes=0)
    file = str(tmp_path / "hub" / "model.safetensors")
    model = build_model("timm:test_vit", num_classes=5, image_size=64)
    said = load_weights(model, "timm:test_vit", file, 5, image_size=64)
    assert "they know 0 classes, so the head for 5 is new" in said
    with pytest.raises(UserError, match="knows nothing"):
        load_weights(model, "timm:test_vit", file, 5, as_they_are=True, image_size=64)


def test_weights_in_the_hubs_cache_are_found_and_others_are_missed_quickly(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    reached, why = imagenet_reach("timm:test_resnet")
    assert not reached and "and type --weights FILE" in why and "huggingface.co" in why
    repository = tmp_path / "cache" / "models--timm--test_resnet.r160_in1k"
    published = in_hub_layout(repository / "snapshots" / "abc", "test_resnet", 160)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    reached, why = imagenet_reach("timm:test_resnet")
    assert reached and "in the hub's cache" in why
    model = build_model("timm:test_resnet", num_classes=3, image_size=32)
    said = load_weights(model, "timm:test_resnet", "imagenet", 3, image_size=32)
    assert "the head for 3 is new" in said
    kept = model.state_dict()["layer1.0.conv1.weight"]
    assert torch.equal(kept, published.state_dict()["layer1.0.conv1.weight"])


def test_position_embeddings_of_torchvision_are_interpolated_as_torchvision_does(tmp_path):
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    def vit(size):
        return VisionTransformer(size, 16, 1, 2, 32, 64, num_classes=10)

    torch.manual_seed(0)
    theirs, mine = vit(224), vit(64)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    said = load_weights(mine, "torchvision:vit_b_16", str(tmp_path / "vit.pth"), 10)
    assert "of 14 x 14 patches interpolated to 4 x 4" in said
    wanted = interpolate_embeddings(64, 16, theirs.state_dict())["encoder.pos_embedding"]
    assert torch.equal(mine.encoder.pos_embedding, wanted)


# Normalisation follows the weights


def test_published_weights_say_what_they_were_trained_with():
    look = looks.published_look("torchvision:efficientnet_v2_l")
    assert (look.mean, look.interpolation, look.crop) == ((0.5, 0.5, 0.5), "bicubic", 1.0)
    assert looks.published_look("alexnet").crop == 0.875
    assert looks.published_look("timm:test_vit").std == (0.5, 0.5, 0.5)
    assert looks.published_look("my_cnn") is None


def card(folder):
    return card_of_weights(str(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def two_files(nets):
    """Runs whose pictures were normalised by other numbers than those of the data."""
    for name, numbers in (("dark", "0.2/0.5"), ("light", "0.7,0.6,0.5/0.1,0.2,0.3")):
        flags = ["--model", "plain.py:Net", *SMALL, "--limit", "200", "--epochs", "1"]
        done = train([*flags, "--normalize", numbers, "--run-dir", name], nets)
        assert done.status == 0 and "(flag)" in done.out, done.out
    return nets


@pytest.mark.slow
def test_fine_tuning_normalises_as_the_weights_were_trained(two_files):
    flags = ["--model", "plain.py:Net", *SMALL, "--limit", "200", "--epochs", "1", "--lr", "0"]
    for name, mean in (("dark", 0.2), ("light", 0.7)):
        weights = ["--weights", f"{name}/model.safetensors"]
        done = train([*flags, *weights, "--run-dir", f"from-{name}"], two_files)
        assert done.status == 0 and "(weights)" in done.out, done.out
        told = card(two_files / f"from-{name}")
        assert told["mean"][0] == mean and told["std"] == card(two_files / name)["std"]
        # Nothing was trained: what was right stays right, which other numbers would not give.
        before, after = (rows(two_files / n)[-1] for n in (name, f"from-{name}"))
        assert after["test/loss"] == before["test/loss"]
        evaluated = train([*flags, *weights, "--eval-only"], two_files)
        assert f"loss {before['test/loss']:.6g}" in evaluated.out
    done = train([*flags, *weights, "--normalize", "data", "--run-dir", "own"], two_files)
    assert done.status == 0, done.out
    assert card(two_files / "own")["mean"][0] not in (0.2, 0.7)
    again = train([*flags, "--run-dir", "from-dark", "--epochs", "2"], two_files)
    assert again.status == 0 and card(two_files / "from-dark")["mean"][0] == 0.2, again.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--normalize", "0.5"], "must be data, weights, or MEAN/STD"),
        (["--normalize", "0.5/0"], "must be data, weights, or MEAN/STD"),
        (["--normalize", "weights"], "there are none; name some with --weights"),
    ],
)
def test_a_normalisation_that_means_nothing_is_a_sentence(flags, says):
    from config import parse

    with pytest.raises(UserError, match=says):
        parse(["--model", "my_cnn", "--weights", "none", *flags])


def test_photographs_are_scaled_and_cut_as_the_weights_say(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    for place in range(12):
        pixels = torch.randint(0, 255, (90, 120, 3), dtype=torch.uint8).numpy()
        folder = tmp_path / "data" / "train" / "ab"[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "test")
    in_hub_layout(tmp_path / "hub", "test_resnet", 64, interpolation="bicubic")
    flags = ["--model", "timm:test_resnet", "--weights", "hub/model.safetensors", "--epochs", "1"]
    flags += ["--dataset", "data", "--image-size", "54", "--batch-size", "4", "--threads", "1"]
    done = train([*flags, "--no-plots", "--run-dir", "run", "--augment", "none"], tmp_path)
    assert done.status == 0, done.out
    told = card(tmp_path / "run")
    assert told["mean"] == [0.3, 0.4, 0.5] and told["interpolation"] == "bicubic"
    assert (told["eval_size"], told["eval_resize"]) == (54, 60)
    picture = next((tmp_path / "data" / "test").rglob("*.png"))
    done = python(str(REPOSITORY / "predict.py"), picture, "--run", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# The laws


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
def test_a_model_of_timm_is_the_same_run_on_two_processes_one_of_which_is_killed(nets, name):
    flags = ["--model", name, *DIGITS, "--epochs", "2", "--bitwise", "--checkpoint-every", "2"]
    _, broken = same_after_a_kill(nets, flags, name[5:], step=3)
    done = train(["--resume", broken, "--eval-only"], nets)
    assert done.status == 0, done.out
    tensors = load_file(broken / "model.safetensors")
    assert tensors.keys() == build_model(name, num_classes=10, image_size=32).state_dict().keys()
