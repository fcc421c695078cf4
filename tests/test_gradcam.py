"""Mistakes by name, spread over the classes, and where the model looked."""

import json

import pytest
import torch
from launches import SMALL, train
from PIL import Image
from torch import nn

from report import page
from report.gradcam import gradcam, heated


class Corner(nn.Module):
    """Says class 1 by what its first map has, at one place of four by four."""

    def __init__(self, flat: bool = False):
        super().__init__()
        self.pool, self.flat = nn.AvgPool2d(4), flat
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))

    def forward(self, images):
        maps = images if self.flat else self.pool(images)
        return self.head(maps.mean((2, 3)))


def test_the_place_that_spoke_for_the_answer_is_hot():
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, 4:8, 12:16] = 1.0  # speaks for class 1
    image[:, 1, 8:12, 0:4] = 1.0  # and this for class 0
    first, second = gradcam(Corner(), image.repeat(2, 1, 1, 1), [1, 0])
    assert first[1, 3] == 1 and first.sum() == 1 and second[2, 0] == 1 and second.sum() == 1
    hot = heated(torch.full((3, 16, 16), 100, dtype=torch.uint8), first).int()
    assert hot[0, 5, 14] > 200 > 80 > hot[0, 14, 2] and hot[2, 5, 14] < 20


def test_a_layer_that_reads_each_place_apart_is_believed_place_by_place():
    """What one place says for the answer, and another against it, has a mean of zero."""
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].weight[1, 7], model[2].weight[1, 8] = 1.0, -1.0  # places (1, 3) and (2, 0)
    (heat,) = gradcam(model, torch.ones(1, 3, 16, 16), [1])
    assert heat[1, 3] == 1 and heat.sum() == 1


def test_a_model_without_a_map_of_places_has_none():
    assert gradcam(Corner(flat=True), torch.rand(1, 3, 16, 16), [0]) is None


def test_a_run_tells_its_mistakes_by_name_of_every_class(tmp_path, nets):
    draw = torch.Generator().manual_seed(0)
    for number in range(90):
        part = tmp_path / "data" / ("train" if number % 3 else "test") / "abc"[number % 9 // 3]
        part.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (16, 16, 3), generator=draw).byte().numpy()  # noise: a guess
        Image.fromarray(pixels).save(part / f"<b>{number}.png")
    words = ["--model", nets / "plain.py:Net", *SMALL[2:-1], "--batch-size", "30", "--epochs", "3"]
    words += ["--dataset", tmp_path / "data", "--run-dir", "r", "--plots"]
    done = train(words, tmp_path)
    assert done.status == 0 and "pictures could be drawn" not in done.out, done.out
    told = json.loads((tmp_path / "r" / "mistakes.json").read_text())["mistakes"]
    summary = json.loads((tmp_path / "r" / "confusion.json").read_text())["matrix"]
    wrong = {y for y, row in enumerate(summary) if sum(row) > row[y]}
    assert {one["label"] for one in told} == wrong and len(wrong) >= 2
    for one in told:
        assert (tmp_path / "data" / one["name"]).is_file()
        assert one["name"].split("/")[-2] == "abc"[one["label"]] and one["answer"] != one["label"]
    made = page.build(tmp_path / "r")
    assert made.count("data:image/png") == 3 and f"these {len(told)} pictures" in made
    assert "&lt;b&gt;" in made and "<b>" + told[0]["name"].split("<b>")[1] not in made
    with Image.open(tmp_path / "r" / "gradcam.png") as picture:
        assert min(picture.size) > 150


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("googlenet", 96), ("speednet", 32)])
def test_models_of_the_table_have_a_map(name, size):
    from models import build_model

    model = build_model(name, num_classes=4, image_size=size).eval()
    looked = gradcam(model, torch.rand(2, 3, size, size), [1, 3])
    assert looked.ndim == 3 and looked.max() <= 1
