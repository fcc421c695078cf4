"""One channel instead of three, and anti-aliased downsampling: built, kept, rebuilt, exported."""

import json

import numpy as np
import pytest
import torch
from launches import SMALL, python, same_after_a_kill, train
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from config import HINTS, parse
from data.augment import Augment
from data.grey import grey
from data.image_set import ImageSet
from data.sources.describe import grey_levels
from distributed.checkpoint import card_of
from models import PARTS, build_from, build_model
from models.__main__ import table_of_layers
from models.blurpool import add_blur
from models.weights import load_weights


def test_a_grey_pixel_is_exactly_itself_and_a_colour_what_pillow_calls_it():
    levels = torch.arange(256).float().view(1, 1, 16, 16)
    assert torch.equal(grey(levels.expand(-1, 3, -1, -1)), levels)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    made = grey(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0, 0]
    pillow = torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).copy())
    assert (made - pillow).abs().max() <= 0.5 + 1e-4


def test_mean_and_deviation_are_those_of_the_brightness():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    mean, std = grey_levels(ImageSet(images, torch.zeros(50, dtype=torch.int64)), 8)
    seen = Augment("none", 8, (mean,), (std,), seed=0).evaluate(images)
    assert seen.shape == (50, 1, 8, 8)
    assert abs(float(seen.mean())) < 0.01 and float(seen.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:vit_b_16", "timm:test_resnet", "timm:test_vit",
             "alexnet", "vgg11", "resnet18", "speednet", "my_cnn"],
)  # fmt: skip
def test_summed_filters_answer_to_a_grey_image_as_they_did_in_colours(name, tmp_path):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    coloured = build_model(name, num_classes=5, image_size=64).eval()
    torch.manual_seed(1)
    one = build_model(name, num_classes=5, image_size=64, channels=1).eval()
    if name == "speednet":  # it has one filter for each direction of a patch
        assert one(torch.randn(2, 1, 64, 64)).shape == (2, 5)
        return
    torch.save(coloured.state_dict(), tmp_path / "colours.pth")
    told = load_weights(one, name, str(tmp_path / "colours.pth"), 5, image_size=64)
    assert "summed over the colours" in told
    images = torch.randn(2, 1, 64, 64)
    assert torch.allclose(one(images), coloured(images.expand(-1, 3, -1, -1)), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "says"),
    [("googlenet", "a rule for three colours"), ("linear_regression", "sees no images")],
)
def test_a_model_that_cannot_see_one_channel_says_so(name, says):
    with pytest.raises(UserError, match=f"--channels 1: .*{says}"):
        build_model(name, num_classes=1, image_size=64, channels=1)


OWN = """
from torch import nn

class Told(nn.Module):
    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_channels, 4, 3), nn.LazyLinear(num_classes)
    def forward(self, images):
        return self.head(self.conv(images).flatten(1))

class Mnist(Told):
    def __init__(self, num_classes):
        super().__init__(num_classes, 1)

class Colours(Told):
    def __init__(self, num_classes):
        super().__init__(num_classes, 3)
"""


@pytest.fixture(scope="module")
def folder(nets):
    (nets / "grey_net.py").write_text(OWN)
    return nets


@pytest.mark.slow
def test_one_channel_is_trained_resumed_predicted_and_exported(folder):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    flags = ["--model", "resnet18", *SMALL, "--limit", "120", "--epochs", "2", "--batch-size", "30"]
    flags += ["--channels", "1", "--blurpool", "conv", "--shards", "2", "--bitwise"]
    flags += ["--checkpoint-every", "3", "--freeze", "layer2"]
    whole, broken = same_after_a_kill(folder, flags, "grey", step=5)
    assert "channels" in whole.out and "blurpool" in whole.out
    weights = load_file(broken / "model.safetensors")
    assert weights["conv1.weight"].shape == (64, 1, 3, 3) and not any("blur" in k for k in weights)
    picture = folder / "one.png"
    Image.fromarray(np.arange(0, 256, 4, np.uint8).reshape(8, 8)).save(picture)
    done = python("predict.py", picture, "--run", broken, "--json")
    assert done.returncode == 0, done.stderr
    out = folder / "grey.onnx"
    done = python("-m", "export", broken, "--to", "onnx", "--out", out)
    assert done.returncode == 0 and "all answers equal" in done.stdout, done.stdout + done.stderr
    import onnxruntime

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 1, 16, 16]
    told = json.loads(session.get_modelmeta().custom_metadata_map["lockstep"])
    assert told["input"]["channels"] == "L" and len(told["preprocessing"]["mean"]) == 1
    card = card_of(broken / "model.safetensors")
    assert (card["channels"], card["blurpool"]) == (1, "conv")
    model = build_from(card, 10).eval()
    assert sum(hasattr(m, "blur") for m in model.modules()) == 6
    # Fine-tuned from it, with no word of channels; another number of them is a sentence.
    more = ["--model", "resnet18", *SMALL, "--limit", "60", "--epochs", "1", "--dry-run"]
    more += ["--weights", broken / "model.safetensors"]
    done = train(more, folder)
    assert done.status == 0 and "channels" in done.out, done.out
    done = train([*more, "--channels", "3"], folder)
    assert done.status == 2 and "--channels 1 --blurpool conv" in done.out, done.out


def test_what_a_model_is_made_of_is_a_flag_whose_default_is_the_usual_and_debug_shows_it():
    assert {name: HINTS[name].default for name in PARTS} == PARTS
    plain, grey = (
        next(iter(table_of_layers("resnet18", 16, 10, parts)[0].columns[3].cells))
        for parts in ({}, {"channels": 1})
    )
    assert (plain, grey) == ("1,728", "576")  # 3 x 3 x 3 x 64, and a third of it


@pytest.mark.parametrize("name", ["Told", "Mnist", pytest.param("my_cnn", marks=pytest.mark.slow)])
def test_models_of_ones_own_see_one_channel_too(folder, name):
    model = name if name == "my_cnn" else f"grey_net.py:{name}"
    flags = ["--model", model, *SMALL, "--limit", "120", "--epochs", "1", "--channels", "1"]
    done = train([*flags, "--run-dir", f"own-{name}"], folder)
    assert done.status == 0, done.out
    for form in ("safetensors", "hub"):
        out = folder / f"own-{name}-{form}"
        out = out.with_suffix(".safetensors") if form == "safetensors" else out
        done = python("-m", "export", folder / f"own-{name}", "--to", form, "--out", out)
        assert done.returncode == 0, done.stdout + done.stderr
    card = (folder / f"own-{name}-hub" / "README.md").read_text()
    assert ("in_channels=1" in card) == (name == "Told"), card
    assert ("channels=1" in card) == (name != "Mnist")


def test_a_class_for_colours_fails_its_trial_with_a_sentence(folder):
    flags = ["--model", "grey_net.py:Colours", *SMALL, "--limit", "60", "--channels", "1"]
    done = train([*flags, "--dry-run"], folder)
    assert done.status == 2 and "Traceback" not in done.out, done.out
    assert "3 channels" in done.out and "--channels 1" in done.out


# Anti-aliasing


def test_a_blurred_convolution_is_ffcvs_and_a_blurred_pool_is_zhangs():
    torch.manual_seed(0)
    first, conv = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 8, 3, stride=2, padding=1)
    pool, up = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)
    model = nn.Sequential(first, nn.Sequential(conv, pool), up)
    names = set(model.state_dict())
    assert add_blur(model, pools=False) == 1 and add_blur(model, pools=True) == 1
    assert set(model.state_dict()) == names and model[0] is first and model[2] is up
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    maps = torch.randn(2, 16, 13, 16)

    def blurred(maps, stride=1):
        return F.conv2d(maps.flatten(0, 1)[:, None], kernel[None, None], stride=stride, padding=1)

    expected = conv(blurred(maps).view_as(maps))
    found = model[1][0](maps)
    assert torch.allclose(found, expected, atol=1e-5)
    expected = blurred(F.max_pool2d(found, 3, 1, 1), 2)
    assert torch.allclose(model[1][1](found).flatten(), expected.flatten(), atol=1e-5)
    assert model[1][1](found).shape == pool(found).shape


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 8, 3, 2, 1, bias=False), nn.MaxPool2d(2)])
def test_what_skips_pixels_answers_more_alike_to_a_moved_image(layer):
    """What it is for (Zhang, 2019)."""
    torch.manual_seed(0)
    maps, model = torch.randn(4, 16, 64, 64), nn.Sequential(layer)
    apart = []
    with torch.no_grad():
        for pools in (False, True):
            _ = pools and add_blur(model, pools=True)
            answer, moved = (model(m)[:, :, 4:-4, 4:-4] for m in (maps, maps.roll(1, 3)))
            apart.append(float((answer - moved).std() / answer.std()))
    assert apart[1] < 0.8 * apart[0], apart


def test_nothing_to_blur_and_words_that_are_none_are_sentences():
    with pytest.raises(UserError, match="--blurpool conv: my_cnn has no layer that it is for"):
        build_model("my_cnn", num_classes=3, image_size=8, blurpool="conv")
    for flags, says in (
        ("--channels 2", "one of: 1, 3"),
        ("--blurpool some", "one of: none, conv, all"),
        ("--model linear_regression --channels 1", "linear_regression sees none"),
    ):
        with pytest.raises(UserError, match=says):
            parse(flags.split())
