"""A page that follows a run: behind a token, on this machine, read-only; and the time left."""

import http.client
import json
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from launches import REPOSITORY, SMALL, Command, begun, command, finish, start, wait_for
from refusals import refused
from test_page import fabricate

from common.errors import UserError
from config import parse
from distributed.checkpoint import Progress
from report import live, page, reader
from report.board import Board
from report.logbook import time_left
from report.screen import SpeedMeter
from training.schedule import build_schedule


@pytest.fixture
def served(tmp_path):
    """A fabricated run, and how to ask its server."""
    folder = fabricate(tmp_path / "run")
    (folder / "secret").write_text("secret")
    server, address = live.serve(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    parts = urlsplit(address)

    def ask(path="", method="GET", host=None, absolute=False):
        connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=60)
        target = path if absolute else parts.path + path
        connection.putrequest(method, target, skip_host=True)
        if host != "":
            connection.putheader("Host", host or parts.netloc)
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer, text

    yield SimpleNamespace(folder=folder, ask=ask, address=address, token=parts.path.strip("/"))
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_stranger_gets_nothing(served):
    assert served.ask()[0].status == 200
    wrong = served.token[:-1] + ("A" if served.token[-1] != "A" else "B")
    for path in (
        "/",
        "/rows",
        f"/{wrong}/",
        f"/{wrong}/rows",
        f"/{served.token}",
        "//",
        "/%C3%A9",
        "rows",
        "//[x",
    ):
        answer, text = served.ask(path, absolute=True)
        assert answer.status == 404 and served.token not in text, path
    for path in ("secret", "../run/secret", "..%2f..%2fetc/passwd", "/etc/passwd", "rows/../secret",
                 "%2e%2e/secret", "metrics.jsonl", "config.json"):  # fmt: skip
        answer, text = served.ask(path)
        assert answer.status == 404 and "secret" not in text, path
    assert "../" not in served.ask()[0].headers["Content-Security-Policy"]
    assert urlsplit(served.address).hostname == "127.0.0.1" and len(served.token) >= 32


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_page_of_another_name_gets_nothing(served, host):
    answer, text = served.ask("rows", host=host)
    assert answer.status == 403 and "step" not in text


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:7"])
def test_a_tunnel_may_end_at_any_port(served, host):
    assert served.ask("rows", host=host)[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_nothing_can_be_changed(served, method):
    before = sorted((p.name, p.read_bytes()) for p in served.folder.iterdir())
    answer, _ = served.ask(method=method)
    assert answer.status == 405 and answer.headers["Allow"] == "GET"
    assert sorted((p.name, p.read_bytes()) for p in served.folder.iterdir()) == before


def test_rows_come_once_whole_and_again_after_another_life(served):
    def rows(place=0, life=None):
        life = first["life"] if life is None else life
        return json.loads(served.ask(f"rows?from={place}&life={life}")[1])

    file = served.folder / "metrics.jsonl"
    first = rows(life="")
    count = len(file.read_text().splitlines())
    assert len(first["rows"]) == count and first["to"] == file.stat().st_size
    assert first["state"] == "finished" and first["best"] == "87.50 %"
    with file.open("a") as opened:
        opened.write('{"step": 7, "train/loss": 0.5}\nno row\n{"step": 8, "tr')
    more = rows(first["to"])
    assert [row["step"] for row in more["rows"]] == [7] and more["from"] == first["to"]
    with file.open("a") as opened:
        opened.write('ain/loss": 0.25}\n')
    assert [row["step"] for row in rows(more["to"])["rows"]] == [8]
    assert rows(more["to"], life="1")["from"] == 0  # the file was cut back, and is longer by now
    file.write_text('{"step": 1}\n')
    assert rows(more["to"])["rows"] == [{"step": 1}]
    file.unlink()
    assert rows()["rows"] == []
    for name in ("status", "config", "summary", "metrics"):
        (served.folder / f"{name}.json").write_text("{")
        assert served.ask("rows")[0].status == 200


def test_a_page_that_stays_open_reads_each_row_once(served, monkeypatch):
    """A long run has a hundred megabytes of them, and a page asks every two seconds."""
    first, read = json.loads(served.ask("rows")[1]), places_read(monkeypatch)
    with (served.folder / "metrics.jsonl").open("a") as opened:
        opened.write('{"step": 99, "epoch": 9, "test/accuracy": 0.99, "test/loss": 0.1}\n')
    later = json.loads(served.ask(f"rows?from={first['to']}&life={first['life']}")[1])
    assert later["best"] == "99.00 %" and dict(later["facts"])["step"].startswith("99")
    assert read and set(read) == {first["to"]}
    (served.folder / "metrics.jsonl").write_text('{"step": 1, "test/accuracy": 0.25}\n')
    assert json.loads(served.ask("rows")[1])["best"] == "25.00 %"


def test_a_run_that_was_started_over_shows_no_row_of_the_one_before(served):
    """With --fresh, in the same folder: its life has the same number, its file may be longer."""
    file, status = served.folder / "metrics.jsonl", served.folder / "status.json"
    first, told = json.loads(served.ask("rows")[1]), json.loads(status.read_text())
    told["lives"] = [{"life": told["life"], "began": "2030-01-01 00:00:00"}]
    status.write_text(json.dumps(told))
    row = '{"step": 1, "test/accuracy": 0.25}\n'
    file.write_text(row * 2 * (file.stat().st_size // len(row)))
    later = json.loads(served.ask(f"rows?from={first['to']}&life={first['life']}")[1])
    assert later["from"] == 0 and later["best"] == "25.00 %"


def places_read(monkeypatch):
    """From where on metrics.jsonl is read from now on."""
    read, whole, new_rows = [], page.content, reader.new_rows
    for module in (live, reader):
        monkeypatch.setattr(
            module, "new_rows", lambda file, place: read.append(place) or new_rows(file, place)
        )
    monkeypatch.setattr(page, "content", lambda path: read.append(path.name) or whole(path))
    return read


def test_the_board_of_many_runs_reads_each_row_once(served, monkeypatch):
    """It looks every two seconds too, at all that run."""
    run = SimpleNamespace(folder=served.folder, state="runs", reason="", seconds=100.0)
    board = Board(served.folder.parent, [run])
    board._note_best(run)
    assert "best 87.50 %" in board.headline()
    size, read = (served.folder / "metrics.jsonl").stat().st_size, places_read(monkeypatch)
    with (served.folder / "metrics.jsonl").open("a") as opened:
        opened.write('{"step": 99, "epoch": 9, "test/accuracy": 0.99, "test/loss": 0.1}\n')
    board._note_best(run)
    assert read == [size] and "best 99.00 %" in board.headline()
    assert {*read} == {size, (served.folder / "metrics.jsonl").stat().st_size}


def test_a_port_that_is_taken_and_a_folder_without_a_run_are_sentences(served, tmp_path):
    port = urlsplit(served.address).port
    with pytest.raises(UserError, match="without --port a free one"):
        live.serve(served.folder, port)
    for number in (-1, 65536):
        with refused("port", match="from 0 to 65535"):
            live.serve(served.folder, number)
    with pytest.raises(UserError, match="holds no run"):
        live.command(tmp_path)


def test_rows_appear_while_a_run_trains_and_its_end_is_told(nets, tmp_path):
    words = ["--model", f"{nets / 'plain.py'}:Net", *SMALL, "--epochs", "400", "--run-dir", "r"]
    process, log = start(command(words), tmp_path)
    wait_for(begun(tmp_path / "r"), process, log)
    script = (
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom report.__main__ import main\n"
    )
    (tmp_path / "go.py").write_text(script + "sys.exit(main(sys.argv[1:]))\n")
    shown, output = start(Command([tmp_path / "go.py", "live", tmp_path / "r"]), tmp_path)
    wait_for(lambda: "Ctrl-C" in output.read_text(), shown, output)
    address = urlsplit(output.read_text().split()[1])

    def asked(place=0):
        connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=60)
        connection.request("GET", f"{address.path}rows?from={place}")
        return json.loads(connection.getresponse().read())

    first = asked()
    assert first["state"] == "running", first
    wait_for(lambda: asked(first["to"])["rows"], process, log)
    wait_for(lambda: "time left" in dict(asked()["facts"]), process, log)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log).status == 75
    last = asked()
    assert last["state"] == "stopped" and "SIGTERM" in last["reason"]
    steps = [row["step"] for row in last["rows"]]
    assert steps == sorted(steps) and len(steps) > len(first["rows"])
    shown.send_signal(signal.SIGINT)
    done = finish(shown, output)
    assert done.status == 0 and "Traceback" not in done.out, done.out
    assert done.out.splitlines()[-1].endswith("was only read") and "ssh -N -L" in done.out


@pytest.mark.parametrize("evaluates", [0.0, 4.0])
@pytest.mark.parametrize("every", [1, 2])
def test_the_time_left_is_right_from_a_tenth_of_an_epoch_on(evaluates, every):
    """A constant sleep per step, a slow first step, saves between, evaluations of any length."""
    now = [0.0]
    clock = SpeedMeter(lambda: now[0])
    config = replace(parse(["--model", "my_cnn", "--epochs", "6"]).config, eval_every=every)
    schedule = build_schedule(config, 40)
    progress = Progress(steps_per_epoch=40)
    told, evaluation = [], 0.0
    while progress.step < schedule.last_step:
        now[0] += 0.25 + (progress.step == 0) * 9
        clock.step()
        progress.step += 1
        if progress.step >= 4:  # a tenth of an epoch
            told.append((now[0], time_left(clock, schedule, progress, evaluation, 10)))
        else:
            assert not time_left(clock, schedule, progress, evaluation, 10)  # a slow first step
        if schedule.evaluates(progress):
            cost = evaluates or 0.25 * 10 / 3
            now[0] += cost
            clock.pause(cost)
            evaluation, progress.evaluated = cost, progress.step
    first = [pair for pair in told if not evaluates or pair[0] > 9 + 0.25 * 40 * every + evaluates]
    assert len(first) > 100
    for at, left in first:
        assert abs(left - (now[0] - at)) <= 0.25 * (now[0] - at) + 1e-6
