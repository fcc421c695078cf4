"""A model that leaves: it answers the same in a process that has never heard of Lockstep."""

import fnmatch
import json
import socket

import pytest
import torch
from launches import REPOSITORY, SMALL, python, train
from PIL import Image
from torch import nn

from common.disk import write_json
from distributed.checkpoint import save_tensors
from export import forms, hub
from export.__main__ import main as export_main
from export.check import compare, pictures_of_run
from export.hub import loading
from export.service import Service, preprocessing, threshold
from models import build_model
from models.state import whole_state
from predict import load_run

# What another program does: it reads the file's own words, and follows them.
CONSUMER = """
import json, sys
import numpy, torch
from PIL import Image
form, path, *pictures = sys.argv[1:]
if form == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    said = json.loads(session.get_modelmeta().custom_metadata_map["lockstep"])
    ask = lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    assert session.get_inputs()[0].shape[0] == "batch"
else:
    extra = {"lockstep.json": ""}
    ask = torch.export.load(path, extra_files=extra).module()
    said = json.loads(extra["lockstep.json"])
assert said["input"]["normalised_inside"] and said["input"]["range"] == [0, 1]
size, cut = said["preprocessing"]["size"], said["preprocessing"]["shorter_side"]
images = []
for picture in pictures:
    pixels = numpy.asarray(Image.open(picture).convert("RGB")).copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scale = lambda x, h, w: torch.nn.functional.interpolate(
        x, (h, w), mode="bilinear", antialias=True)
    height, width = image.shape[2:]
    if max(height, width) > 64:
        short = min(height, width)
        image = scale(image, cut * height // short, cut * width // short)
        top, left = (round((side - size) / 2) for side in image.shape[2:])
        images.append(image[:, :, top : top + size, left : left + size] / 255)
    else:  # it stays whole
        images.append(scale(image / 255, size, size))
chances = ask(torch.cat(images)).softmax(1)
alone = torch.cat([ask(image).softmax(1) for image in images])
assert torch.allclose(chances, alone, atol=1e-5)
assert not {"models", "tasks", "export"} & sys.modules.keys()
print(json.dumps([dict(zip(said["classes"], row)) for row in chances.tolist()]))
"""


@pytest.fixture(scope="module")
def run(nets):
    """A trained run with averaged weights."""
    words = ["--model", "full.py:Net", *SMALL, "--epochs", "4", "--lr", "0.01", "--ema", "0.9"]
    done = train([*words, "--run-dir", "leaves"], nets)
    assert done.status == 0, done.out
    return nets / "leaves"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(load_digits().images[:12]):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(folder / f"{index:02}.png")
    return sorted(folder.glob("*.png"))


def predicted(run, pictures, *words) -> list[dict[str, float]]:
    """What predict.py says, as class -> confidence."""
    asked = [*pictures, "--run", run, "--json", "--top", "1000", *words]
    done = python(REPOSITORY / "predict.py", *asked)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return [{p["class"]: p["confidence"] for p in row["predictions"]} for row in found]


def as_others_do(form, file, pictures, folder) -> list[dict[str, float]]:
    (folder / "consumer.py").write_text(CONSUMER)
    done = python(folder / "consumer.py", form, file, *pictures, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def near(one: list[dict], other: list[dict], apart: float = 1e-5) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(abs(a[k] - b[k]) < apart for k in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("form", ["onnx", "torch.export"])
def test_a_process_that_knows_only_the_file_answers_the_same(run, digits, tmp_path, form, capfd):
    if form == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    assert export_main([str(run), "--to", form, "--check", "40"]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "on 40 test pictures: all answers equal, largest" in told and "averaged" in told, told
    file = run / "export" / forms.NAMES[form]
    assert near(as_others_do(form, file, digits, tmp_path), predicted(run, digits))
    assert [p.name for p in file.parent.iterdir() if p.name.startswith(".")] == []


def test_photographs_are_described_so_that_others_see_them_alike(nets, tmp_path):
    draw = torch.Generator().manual_seed(0)
    for index in range(8):
        folder = tmp_path / "photos" / ("train", "test")[index % 2] / "ab"[index // 4]
        folder.mkdir(parents=True, exist_ok=True)
        small = torch.rand(1, 3, 6, 7, generator=draw)
        large = nn.functional.interpolate(small, (90 + index, 120), mode="bicubic").clamp(0, 1)
        pixels = (large[0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    words = ["--dataset", tmp_path / "photos", "--image-size", "16", "--eval-resize", "22"]
    words += ["--batch-size", "4", "--threads", "1", "--no-plots", "--epochs", "2"]
    run = tmp_path / "run"
    done = train(["--model", nets / "plain.py:Net", *words, "--run-dir", run], tmp_path)
    assert done.status == 0, done.out
    assert export_main([str(run), "--to", "torch.export", "--out", str(tmp_path / "x.pt2")]) == 0
    pictures = sorted((tmp_path / "photos" / "test").rglob("*.png"))
    mine = predicted(run, pictures)
    assert near(as_others_do("torch.export", tmp_path / "x.pt2", pictures, tmp_path), mine)


def test_a_folder_for_the_hub_loads_by_its_own_words_and_keeps_a_card(run, digits, capfd):
    assert export_main([str(run), "--to", "hub", "--last"]) == 0
    told = " ".join(capfd.readouterr().out.split())
    folder = run / "export" / "hub"
    card = (folder / "README.md").read_text()
    assert "read it, and choose a licence" in told and "last averaged weights" in told
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert config["metrics"]["accuracy"] == summary["test/accuracy"]
    assert (
        config["id2label"]["7"] == "7" and f"| accuracy | {summary['test/accuracy']:.4g} |" in card
    )
    for path in folder.rglob("*"):  # nothing of this machine leaves with it
        assert path.is_dir() or str(run.parent).encode() not in path.read_bytes(), path
    code = card.split("```python\n")[1].split("```")[0]
    script = folder.parent / "as_the_card_says.py"
    script.write_text(code + "print(sum(p.sum().item() for p in model.parameters()))\n")
    done = python(script, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert predicted(folder, digits, "--trust-code") == predicted(run / "last.safetensors", digits)
    for path in folder.rglob("*"):  # nor what an upload takes after it was tried
        left_out = fnmatch.fnmatch(str(path.relative_to(folder)), hub.COMPILED)
        assert path.is_dir() or left_out or str(run.parent).encode() not in path.read_bytes(), path
    (folder / "README.md").write_text("mine")
    assert export_main([str(run), "--to", "hub"]) == 0
    assert (folder / "README.md").read_text() == "mine"
    assert predicted(folder, digits, "--trust-code") == predicted(run, digits)


def test_no_class_is_markup_on_the_card(run):
    """A folder may be called anything; the hub shows the card as GitHub shows Markdown."""
    from markdown_it import MarkdownIt  # which rich brings

    _, told = load_run(run)
    names = ["a|b", "`rm`", "``", "*c* _d_", "<b>e</b>", "f\\", "g_h"]
    description = {
        "metrics": {f"recall of {name}": 0.5 for name in names}, "model": "*m*", "dataset": "_d_",
        "run": "x <i>", "averaged": False, "weights": "best", "step": 1,
        "preprocessing": {"steps": []},
    }  # fmt: skip
    made = hub.model_card(description, {**told, "classes": names, "model": "my_cnn"}, "my_cnn")
    tokens = MarkdownIt("commonmark").enable("table").parse(made.split("---\n", 2)[2])
    pieces = [piece for token in tokens for piece in token.children or []]
    assert [piece.content for piece in pieces if piece.type == "code_inline"][: len(names)] == names
    assert not {piece.type for piece in pieces} & {"em_open", "html_inline", "strong_open"}
    cells = [token.content for token in tokens if token.type == "inline"]
    assert sum(cell.startswith("recall of") for cell in cells) == len(names) == cells.count("0.5")


def test_an_upload_leaves_out_what_python_compiled_where_the_folder_was_tried(
    tmp_path, monkeypatch
):
    """Such a file names folders of this machine. The hub itself cannot be asked here."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    (tmp_path / "code" / "__pycache__").mkdir(parents=True)
    for name in ("config.json", "code/net.py", "code/__pycache__/net.cpython-311.pyc"):
        (tmp_path / name).write_text("")
    sent: list[str] = []

    class Hub:
        def __init__(self, endpoint):
            pass

        def create_repo(self, *words, **more):
            pass

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns=None):
            files = (p for p in folder_path.rglob("*") if p.is_file())
            names = [p.relative_to(folder_path).as_posix() for p in files]
            sent.extend(filter_repo_objects(names, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(hub, "unreached", lambda *_: "")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert hub.upload(tmp_path, "me/it").endswith("/me/it")
    assert sorted(sent) == ["code/net.py", "config.json"]


def test_an_upload_that_cannot_be_is_told_at_once_and_the_folder_is_there(run, capfd, monkeypatch):
    def asked() -> str:
        assert export_main([str(run), "--to", "hub", "--check", "0", "--upload", "me/it"]) == 2
        return capfd.readouterr().err

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = asked()
    assert "HF_HUB_OFFLINE is set" in told and "hf upload me/it" in told
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert "127.0.0.1 cannot be reached" in asked()
    assert (run / "export" / "hub" / "config.json").exists()


def made_run(folder, code: str):
    """A run folder with untrained weights of a file's Net."""
    folder.mkdir()
    (folder / "net.py").write_text("import torch\nfrom torch import nn\n" + code)
    name = f"{folder / 'net.py'}:Net"
    torch.manual_seed(0)
    model = build_model(name, num_classes=3, image_size=8)
    card = {"model": name, "image_size": 8, "classes": ["a", "b", "c"], "code": {}, "step": 1}
    card |= {"mean": [0.5] * 3, "std": [0.2] * 3, "dataset": "x", "picture_size": [8, 8]}
    write_json(folder / "config.json", {"config": {}, "origins": {}})
    save_tensors(folder / "model.safetensors", whole_state(model), {"lockstep": json.dumps(card)})
    return folder


NET = """
class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.head = nn.Linear(3, num_classes)
    def forward(self, images):
        images = images.mean((2, 3))
        return self.head({})
"""


def test_a_forward_that_no_graph_can_be_is_a_sentence_and_its_weights_leave(tmp_path, capfd):
    run = made_run(tmp_path / "run", NET.format("images if images.sum() > 0 else -images"))
    assert export_main([str(run), "--to", "torch.export"]) == 2
    told = capfd.readouterr().err
    assert "cannot be exported as a graph" in told and "Traceback" not in told
    assert not list((run / "export").iterdir())
    assert export_main([str(run), "--to", "safetensors"]) == 0
    assert "test pictures are not to be had" in " ".join(capfd.readouterr().out.split())


def test_a_file_that_answers_otherwise_is_not_kept(run, capfd, monkeypatch):
    def wrong(self, images):
        return self.model(images * self.scale)  # the mean is forgotten

    monkeypatch.setattr(Service, "forward", wrong)
    assert export_main([str(run), "--to", "torch.export", "--out", str(run / "wrong.pt2")]) == 1
    assert "answers otherwise than the model" in capfd.readouterr().err
    assert not list(run.glob("*wrong*"))


@pytest.mark.parametrize("classes", [1, 3])
def test_many_labels_are_compared_by_what_each_class_is_sure_of(classes):
    """A shift of all logits changes no softmax, and each of these answers."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()
    told = {"task": "multilabel", "threshold": 0.5, "image_size": 2, "mean": [0.5] * 3}
    told |= {"std": [0.5] * 3, "classes": list("abc")[:classes]}
    pictures = torch.randint(0, 256, (40, 3, 2, 2), dtype=torch.uint8)
    same = compare(model, told, lambda images: model((images - 0.5) / 0.5), pictures)
    assert same.holds and same.equal == 40
    off = compare(model, told, lambda images: model((images - 0.5) / 0.5) + 5, pictures)
    assert not off.holds and off.equal < 40


def test_a_description_says_how_a_jpeg_is_decoded_and_when_a_class_is_there():
    told = {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "photographs": True}
    assert "1/2" not in preprocessing(told)["steps"][0]
    assert "1/2" in preprocessing({**told, "decode": "scaled"})["steps"][0]
    assert threshold(told) == {} and threshold({"task": "multilabel", "threshold": 0.3})


def test_a_card_imports_a_file_whose_name_is_no_word_of_python(tmp_path):
    file = tmp_path / "my-net.py"
    file.write_text("from torch import nn\n\nclass Net(nn.Module):\n    pass\n")
    told = {"classes": ["a"], "image_size": 8, "model": f"{file}:Net"}
    compile(loading(told, f"{file}:Net"), "card", "exec")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("nowhere --to onnx", "nowhere: there is no such folder"),
        ("nowhere --to tflite", "invalid choice"),
        ("nowhere --to onnx --upload me/it", "type --to hub"),
        ("nowhere --to hub --check -1", "--check -1: must be"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export_main(words.split()) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_a_missing_package_is_a_sentence(run, monkeypatch, capsys):
    monkeypatch.setattr(forms, "find_spec", lambda name: None)
    assert export_main([str(run), "--to", "onnx"]) == 2
    assert "pip install onnx onnxruntime onnxscript" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["my_cnn", "alexnet", "resnet18", "googlenet", "speednet"])
def test_each_kind_of_model_leaves_as_onnx(name, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_size=96).eval()
    told = {"model": name, "image_size": 96, "mean": [0.4] * 3, "std": [0.2] * 3}
    ask = forms.write_onnx(model, told, "{}", tmp_path / "x.onnx")
    for count in (1, 3):
        images = torch.rand(count, 3, 96, 96)
        assert torch.allclose(ask(images), forms.answer(model, (images - 0.4) / 0.2), atol=1e-4)


def test_the_pictures_that_are_asked_about_are_those_of_the_runs_own_fold(nets):
    words = ["--model", f"{nets / 'plain.py'}:Net", *SMALL, "--epochs", "1", "--fold", "2/3"]
    assert train([*words, "--run-dir", "one-fold"], nets).status == 0
    folder = nets / "one-fold"
    _, told = load_run(folder)
    images = json.loads((folder / "summary.json").read_text())["test/images"]
    assert len(pictures_of_run(folder, told, told["model"], 10_000)) == images > 500


def test_the_pictures_that_are_asked_about_are_those_that_the_run_kept_apart(nets, tmp_path):
    """A list of --split may be another one by now, or gone; the run has its own."""
    for number in range(24):
        place = tmp_path / "own" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * number, 90, 30)).save(place)
    names = [f"{'ab'[number % 2]}/{number}.png" for number in range(24)]
    listed = [
        "name,split",
        *(f"{name},{'test' if n < 6 else 'train'}" for n, name in enumerate(names)),
    ]
    (tmp_path / "parts.csv").write_text("\n".join(listed) + "\n")
    words = ["--model", f"{nets / 'plain.py'}:Net", *SMALL, "--epochs", "1", "--batch-size", "8"]
    words += ["--dataset", str(tmp_path / "own"), "--split", str(tmp_path / "parts.csv")]
    done = train([*words, "--run-dir", str(tmp_path / "run")], nets)
    assert done.status == 0, done.out
    _, told = load_run(tmp_path / "run")
    (tmp_path / "parts.csv").unlink()
    assert len(pictures_of_run(tmp_path / "run", told, told["model"], 100)) == 6
