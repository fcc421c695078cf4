"""The house: imports flow one way, heavy packages are paid by those who use them, main is short."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from distributed.accelerator import ROOMS, code_digests

HOUSE = Path(__file__).resolve().parent.parent

# Each floor may import the floors below it. Rooms of one floor never import each other; the
# modules inside a room (a folder) may.
FLOORS = [
    {"common"},
    {"models", "data"},
    {"config"},
    {"tasks", "optim", "distributed"},
    {"training"},
    {"report"},
    {"many"},
    {"train", "predict"},
    {"export"},
    {"bench"},
]
# Packages with one door; a __main__.py prints tables of its own, outside any run.
DOORS = {
    "rich": {"report/", "models/__main__.py", "common/progress.py"},
    "datasets": {"data/"},
    **{name: {"report/tracking.py"} for name in ("wandb", "trackio", "mlflow")},
    "matplotlib": {"report/pictures.py", "data/__main__.py"},
    "accelerate": {"distributed/", "report/tracking.py", "training/learner.py"},
    "sklearn": {"data/"},
    "PIL": {"data/", "predict.py"},
    **{name: {"export/forms.py"} for name in ("onnx", "onnxruntime")},
    "huggingface_hub": {"export/hub.py", "data/", "models/timm_zoo.py"},
}
HEAVY = {
    "torchvision",
    "datasets",
    "wandb",
    "matplotlib",
    "sklearn",
    "PIL",
    "onnx",
    "onnxruntime",
    "mlflow",
    "trackio",
}
WITHOUT_TORCH = (
    "common/", "config/", "data/sources/__init__.py", "data/image_set.py",
    "models/__init__.py", "models/own_file.py",
)  # fmt: skip


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "-C", str(HOUSE), "ls-files", "-z"], capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        pytest.skip("not a git checkout")
    return [HOUSE / name for name in done.stdout.split("\0") if name and (HOUSE / name).is_file()]


def sources() -> dict[str, ast.Module]:
    """Path from the top -> syntax tree, of every source file but tests."""
    rooms = {name for floor in FLOORS for name in floor} | {"launch"}
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        place = path.relative_to(HOUSE)
        if place.parts[0].removesuffix(".py") in rooms:
            found[place.as_posix()] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room_of(place: str) -> str:
    return place.partition("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of everything imported anywhere in a file, but for type checkers."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names.add((node.module or "").partition(".")[0])
    return names


def at_import_time(tree: ast.Module) -> set[str]:
    """What importing a file imports: everything that stands in no function."""
    names, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and re.search("TYPE_CHECKING|__main__", ast.unparse(node.test)):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= imports(ast.Module([node], []))
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names


def test_at_the_top_stand_the_programs_and_folders():
    assert [path.name for path in tracked() if path.parent == HOUSE and path.suffix == ".py"] == [
        "predict.py",
        "train.py",
    ]


def test_imports_flow_one_way():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for place, tree in sources().items():
        room = room_of(place)
        if room == "launch":
            continue
        for other in imports(tree) & floor_of.keys() - {room}:
            down = floor_of[other] < floor_of[room]
            if not down:
                wrong.append(f"{place} imports {other}")
    assert wrong == []


def test_all_that_decides_numbers_is_in_the_fingerprint_of_the_code():
    rooms = {name for floor in FLOORS for name in floor}
    assert set(ROOMS) == rooms - {"report", "many", "predict", "export", "bench"}
    named = {place for place in code_digests() if place.endswith(".py")}
    assert named == {place for place in sources() if room_of(place) in ROOMS}


def test_launchers_speak_to_the_rest_through_the_command_line_only():
    rooms = {name for floor in FLOORS for name in floor}
    for place, tree in sources().items():
        if room_of(place) == "launch":
            assert not imports(tree) & rooms, place


def test_each_package_has_one_door():
    for place, tree in sources().items():
        if room_of(place) in ("launch", "bench"):
            continue
        for package in imports(tree) & DOORS.keys():
            assert any(place.startswith(door) for door in DOORS[package]), (place, package)


def test_heavy_packages_are_imported_inside_the_function_that_uses_them():
    for place, tree in sources().items():
        if room_of(place) != "bench":  # a measurement pays for what it measures
            assert not at_import_time(tree) & HEAVY, place
        if place.startswith(WITHOUT_TORCH):
            assert not at_import_time(tree) & {"torch", "rich", "accelerate", "numpy"}, place


def test_every_mistake_of_a_user_has_a_code():
    """A short name in kebab case, as a literal where the sentence is: tests can ask for it."""
    for place, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError":
                code = next((k.value for k in node.keywords if k.arg == "code"), None)
                assert code is not None, f"{place}:{node.lineno}"
                if isinstance(code, ast.Constant):
                    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", code.value), code.value


# What can be anything: it is shown, or looked at to learn what it is.
OF_ANY_KIND = {
    "common/text.py": {"printable"}, "config/fields.py": {"convert"},
    "models/class_source.py": {"need", "_is_plain"}, "report/page.py": {"cleaned", "is_number"},
    "report/pictures.py": {"plain"},
}  # fmt: skip


def test_no_parameter_is_an_object_where_a_type_can_be_told():
    for place, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name not in OF_ANY_KIND.get(place, ()):
                told = [a for a in node.args.args + node.args.kwonlyargs if a.annotation]
                named = {a.arg for a in told if ast.unparse(a.annotation) == "object"}
                assert not named, f"{place}:{node.lineno}: {named}"


def test_the_machine_checks_what_signatures_say():
    """Annotations and docstrings by ruff, types by pyright, each pinned where it moves."""
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"ANN001", "ANN401", "D"} <= set(project["tool"]["ruff"]["lint"]["select"])
    assert not {"ANN001", "ANN401", "D103"} & set(project["tool"]["ruff"]["lint"]["ignore"])
    assert "SLF001" in project["tool"]["ruff"]["lint"]["select"]
    assert project["tool"]["pyright"]["typeCheckingMode"] == "basic"
    dev = project["project"]["optional-dependencies"]["dev"]
    assert any(re.match(r"pyright\[nodejs\]==\d", name) for name in dev)
    commands = (HOUSE / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"ruff check .", "pyright"} <= set(commands)


def test_private_names_that_may_be_touched_are_other_peoples():
    """Ruff lets nobody touch what a class keeps for itself, but for some names of torch's."""
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))
    allowed = set(project["tool"]["ruff"]["lint"]["flake8-self"]["ignore-names"])
    touched = set()
    for place, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in allowed:
                assert ast.unparse(node.value) not in ("self", "cls"), f"{place}:{node.lineno}"
                touched.add(node.attr)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.name not in allowed, f"{place}:{node.lineno}"
    assert touched == allowed, "one that nobody needs any more is touched by mistake next"


MISLEAD = {"told", "gradients_are_bad", "step_done", "Chrono", "Apart"}  # as names of things


def test_a_sentence_is_a_message_and_what_weights_say_is_their_card():
    """Words that named sentences, numbers, cards and switches alike name nothing any more."""
    for place, tree in sources().items():
        for node in ast.walk(tree):
            names = {getattr(node, part, None) for part in ("id", "attr", "arg", "name")}
            assert not names & MISLEAD, f"{place}:{node.lineno}: {names & MISLEAD}"


def test_no_folder_hides_a_package():
    for parent in (HOUSE, HOUSE / "launch"):
        for name in ("datasets", "wandb", "torch", "rich", "accelerate", "torchvision"):
            assert not (parent / name).exists() and not (parent / f"{name}.py").exists()


@pytest.mark.parametrize("name", ["main", "train_one_epoch", "train_step", "evaluate"])
def test_the_loop_fits_on_a_screen(name):
    body = sources()["train.py"].body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    assert name in functions
    assert functions[name].end_lineno - functions[name].lineno + 1 <= 43


def test_every_source_file_says_what_it_is_for_in_its_first_line():
    for place, tree in sources().items():
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert 10 < len(first) <= 100, place


def test_nothing_that_is_read_can_run_code():
    """CIFAR-10 is published as pickles; one unpickler of ours builds arrays and nothing else."""
    for place, tree in sources().items():
        names = imports(tree) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        assert names <= ({"pickle"} if place == "data/sources/cifar_batches.py" else set()), place
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec")
            if called == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert safe.get("weights_only") == "True", (place, node.lineno)


def test_no_tracked_file_holds_a_path_of_somebodys_machine():
    # Written in two parts, so that this file passes its own test.
    paths = re.compile(
        "(?<![\\w.~$/])/(" + "|".join(["work", "root", "Users"]) + ")/|/home/[a-z]+/"
    )
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            assert not paths.search(line), f"{path.relative_to(HOUSE)}:{number}: {line.strip()}"


def test_no_large_or_private_file_is_tracked():
    for path in tracked():
        assert path.stat().st_size < 1_000_000, path
        assert not path.name.startswith(".env") and path.suffix not in (".pth", ".pt", ".pkl")


def test_the_core_stays_small():
    lines = {}
    for path in sorted(HOUSE.rglob("*.py")):
        place = path.relative_to(HOUSE)
        if not any(part.startswith(".") or part in ("venv", "build") for part in place.parts):
            lines[place.as_posix()] = len(path.read_text(encoding="utf-8").splitlines())
    for place, count in lines.items():
        print(f"{count:6} {place}")
    rooms: dict[str, int] = {}
    for place, count in lines.items():
        rooms[room_of(place)] = rooms.get(room_of(place), 0) + count
    print(rooms)
    assert rooms["train"] < 170
    assert max(count for place, count in lines.items() if room_of(place) != "tests") < 800
