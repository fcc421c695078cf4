"""The screen: what matters is there, and nothing from outside can disturb a terminal or a file."""

import io
import re

import pytest
from rich.console import Console

from common.text import duration, percent, printable
from report.screen import Report, SpeedMeter

HOSTILE = "[red]boo[/red] \x1b[31mred\x07 [/b] line\nbreak [bold"


def report(width=100, **options) -> tuple[Report, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=False, highlight=False, **options)
    return Report(console=console), file


def harmless(text: str) -> bool:
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_the_start_panel_shows_facts_and_each_setting_with_its_origin():
    made, file = report()
    made.start_panel(
        "lockstep", [("model", "alexnet, 57,000,000 parameters"), ("folder", "runs/x-1")],
        [("lr", "0.05", "recipe"), ("epochs", "3", "file conf.yaml")],
    )  # fmt: skip
    text = file.getvalue()
    for words in ("lockstep", "57,000,000", "runs/x-1", "0.05  (recipe)", "3  (file conf.yaml)"):
        assert words in text
    assert harmless(text) and all(len(line) <= 100 for line in text.splitlines())


def test_an_epoch_is_one_line_in_a_file_however_long():
    made, file = report(width=40)
    told = "epoch 3/10  test loss 0.1234  accuracy 91.20 %  best 91.20 %  ETA 3m10s"
    made.epoch_line(told, better=True)
    assert file.getvalue() == told + "\n"


def test_training_lines_in_a_file_are_rare_and_plain(monkeypatch):
    from report import screen as room

    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    made, file = report()
    made.open_bar(10, 0, "epoch 1/2")
    for step in range(12):
        now[0] += 1
        row = {"train/loss": 2.5, "lr": 0.1, "speed/images_per_second": 12345.6, "step": step}
        made.train_line(row, 20, 125.0)
        made.advance(step)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3 and harmless(file.getvalue())
    assert lines[0] == "  step 0/20  loss 2.5000  lr 0.1  12,346 img/s  ETA 2m05s"
    now[0] += 9
    made.train_line(row, 20, 0.0)  # the first steps do not tell how long the rest will take
    assert file.getvalue().splitlines()[-1].endswith("img/s")


def test_the_class_table_tells_accuracy_and_what_a_class_is_taken_for():
    made, file = report()
    made.class_table(["cat", "dog", "none"], [[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    lines = file.getvalue().splitlines()
    cat = next(line for line in lines if "cat" in line)
    assert re.search(r"cat\W+10\W+8\W+80.00 %\W+100.00 %\W+0.889\W+dog \(2\)", cat)
    assert re.search(r"dog\W+5\W+5\W+100.00 %", file.getvalue())
    assert re.search(r"none\W+0\W+0\W+-", file.getvalue())


def test_answers_are_whole_on_a_narrow_terminal():
    made, file = report(width=40)
    made.predictions({"photos/a long name.png": [("automobile", 3, 0.5)]})
    cells = [line.split("│")[1:] for line in file.getvalue().splitlines() if "│" in line]
    first, second = ("".join(row[n].strip() for row in cells) for n in (0, 1))
    assert first.replace(" ", "") == "photos/alongname.png" and second == "automobile"
    assert "confidence" in file.getvalue()


@pytest.mark.parametrize(
    "show",
    [
        lambda r: r.class_table([HOSTILE, "b"], [[1, 1], [0, 1]]),
        lambda r: r.predictions({HOSTILE: [(HOSTILE, 3, 0.5)]}),
        lambda r: r.start_panel("t", [("data", HOSTILE)], [("lr", HOSTILE, HOSTILE)]),
        lambda r: r.end_panel("t", [("folder", HOSTILE)], good=True),
        lambda r: r.end_panel(HOSTILE, [(HOSTILE, "x")], good=False),
        lambda r: r.start_panel(HOSTILE, [(HOSTILE, "x")], []),
        lambda r: r.warn(HOSTILE),
        lambda r: r.shout(HOSTILE, HOSTILE),
        lambda r: r.show(HOSTILE.replace("\n", " ")),
        lambda r: r.epoch_line(HOSTILE.replace("\n", " "), better=False),
    ],
)
def test_names_from_outside_are_neither_markup_nor_control_characters(show, tmp_path):
    made, file = report(width=200)
    made.attach(tmp_path)
    show(made)
    made.close()
    for text in (file.getvalue(), (tmp_path / "train.log").read_text()):
        assert "[red]boo[/red]" in text and "[/b]" in text and "[bold" in text
        assert harmless(text)


def test_the_log_has_what_the_screen_has_and_a_second_life_appends(tmp_path):
    for life in (1, 2):
        made, file = report()
        made.attach(tmp_path)
        made.warn(f"life {life}")
        made.end_panel("finished", [("best", "91 %")], good=True)
        made.close()
    log = (tmp_path / "train.log").read_text()
    assert log.count("finished") == 2 and "life 1" in log and log.endswith(file.getvalue())


def test_what_a_console_cannot_encode_does_not_end_the_run():
    """On Windows a redirected output is not UTF-8."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    made = Report(console=Console(file=file, width=100, force_terminal=False))
    made.class_table(["犬", "猫"], [[1, 0], [0, 1]])
    made.show("犬")


def test_processes_that_are_not_main_are_silent(tmp_path):
    file = io.StringIO()
    made = Report(enabled=False, console=Console(file=file))
    made.attach(tmp_path)
    made.warn("x")
    made.open_bar(3, 0, "epoch")
    made.class_table(["a"], [[1]])
    made.close()
    assert file.getvalue() == "" and not (tmp_path / "train.log").exists()


def test_a_terminal_gets_a_bar_and_keeps_its_cursor():
    file = io.StringIO()
    made = Report(console=Console(file=file, force_terminal=True, width=100))
    made.open_bar(10, 3, "epoch 1/2")
    made.advance(7)
    made.close()
    shown = file.getvalue()
    assert "epoch 1/2" in shown and shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_words_for_numbers():
    assert [duration(s) for s in (0, 12.4, 59.6, 250, 3599.7, 11100)] == [
        "0s", "12s", "1m00s", "4m10s", "1h00m", "3h05m"
    ]  # fmt: skip
    assert percent(0.91234) == "91.23 %"
    assert printable("a\x1b[0m\n\u202e犬") == "a\\x1b[0m\\n\\u202e犬"


# --- speed and time left -------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_speed_is_images_per_second_since_the_last_row():
    clock = Clock()
    meter = SpeedMeter(clock)
    for _ in range(10):
        clock.now += 0.5
        meter.step()
    assert meter.speed(64) == pytest.approx(128)
    for _ in range(4):
        clock.now += 0.25
        meter.step()
    assert meter.speed(64) == pytest.approx(256)


def test_time_left_does_not_count_the_first_slow_steps_and_is_unknown_before():
    clock = Clock()
    meter = SpeedMeter(clock)
    for took in (60.0, 60.0):
        clock.now += took
        meter.step()
        assert meter.left(100) == 0.0
    for _ in range(5):
        clock.now += 0.5
        meter.step()
    assert meter.left(100) == pytest.approx(50)


@pytest.mark.parametrize("pauses", [(0, 0), (100, 0), (0, 100)])
def test_compiling_is_told_apart_and_not_in_the_speed(pauses):
    clock = Clock()
    meter = SpeedMeter(clock)
    for pause, took in zip(pauses, (60.5, 0.5), strict=True):
        clock.now += pause  # an evaluation that a resumed run begins with, or one after a step
        meter.pause(pause)
        clock.now += took
        meter.step()
    assert meter.leave_out_compiling() == pytest.approx(60)
    assert meter.speed(10) == pytest.approx(20)
    clock.now += 0.5
    meter.step()
    assert meter.speed(10) == pytest.approx(20)


def test_a_pause_counts_neither_in_the_speed_nor_in_the_time_left():
    clock = Clock()
    meter = SpeedMeter(clock)
    for number in range(12):
        clock.now += 0.5
        meter.step()
        if number == 6:
            clock.now += 1000
            meter.pause(1000)
    assert meter.speed(10) == pytest.approx(20)
    assert meter.left(10) == pytest.approx(5)
