"""`python -m report live RUN`: a page on this machine's loopback that follows a run; reads only.

The address holds a random token, so that no other user of the machine and no web page can guess it.
No file is served by its name: there are two answers, the page and what is new in the run's files.
"""

import contextlib
import getpass
import json
import secrets
import signal
import socket
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from urllib.parse import parse_qs

from markupsafe import Markup

from common.disk import Json, read_json
from common.errors import FINISHED, UserError
from common.text import duration, percent, printable
from report.doctor import describe_status
from report.page import HERE, SPEED, STYLE, TEMPLATES, Files, is_number, source_of
from report.reader import Reader, life_of, new_rows

SCRIPT = (HERE / "live.js").read_text(encoding="utf-8")
HOSTS = {"127.0.0.1", "localhost", "[::1]"}  # an ssh tunnel may have any port at its other end
REFUSED = ("HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


def state_of(folder: Path, rows: list[dict]) -> dict[str, Json]:
    """What the page says beside the curves."""
    files = Files(folder, rows)
    status, config = files.status, files.config.get("config", {})
    state, reason = files.state, files.reason
    if state == "running":  # a killed one cannot have said so
        words = describe_status(folder, status)
        state, _, reason = words.partition(", ")
        state = "died" if state.startswith("died") else state
        reason = words if state == "died" else reason
    (row, chosen), metric = files.best, files.deciding
    value = row.get(f"test/{metric.key}")
    best, about = "", ""
    if is_number(value):
        best = metric.show(value)
        about = f"{metric.title}, at epoch {row.get('epoch', '?')}, the best on the {chosen}"
    last = files.rows[-1] if files.rows else {}
    step, steps = last.get("step", 0), status.get("steps")
    facts = [
        ("step", f"{step:,} of {steps:,}" if is_number(steps) else f"{step:,}"),
        ("epoch", f"{last['epoch']} of {config.get('epochs', '?')}" if "epoch" in last else ""),
        ("time left", left(folder, status) if state == "running" else ""),
        ("done", percent(step / steps) if is_number(steps) and steps else ""),
        ("life", f"{status['life'] + 1}" if is_number(status.get("life")) else ""),
        ("model", config.get("model")), ("data", config.get("dataset")),
        ("devices", files.environment.get("devices")),
    ]  # fmt: skip
    charts = [
        {"title": m.title, "keys": [f"{split}/{m.key}" for split in ("train", "val", "test")],
         "share": m.is_share, "may_be_wide": not m.is_share}
        for m in files.metrics if m.has("chart")
    ]  # fmt: skip
    charts += [
        {"title": "learning rate", "keys": ["lr"], "share": False},
        {"title": "images per second", "keys": [SPEED], "share": False},
    ]
    return {
        "name": printable(files.name), "state": state, "reason": printable(reason), "best": best,
        "about": about, "life": life_of(status), "charts": charts,
        "facts": [[name, printable(value)] for name, value in facts if value],
    }  # fmt: skip


def left(folder: Path, status: dict) -> str:
    """The time that is left by now; "" where the run does not know yet."""
    seconds = status.get("left")
    if not is_number(seconds) or not seconds:
        return ""
    since = time.time() - (folder / "status.json").stat().st_mtime
    return f"about {duration(max(1.0, seconds - since))}"


def page_of(name: str) -> tuple[str, str]:
    """The page, and the policy that lets it run this script and nothing else."""
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src {source_of(STYLE)}; "
        f"script-src {source_of(SCRIPT)}; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    made = TEMPLATES.get_template("live.html").render(
        name=name, style=Markup(STYLE), script=Markup(SCRIPT)
    )
    return made, policy


class Handler(BaseHTTPRequestHandler):
    """Answers GET of two addresses behind the token, to a browser that asked this machine."""

    timeout = 20  # seconds: a connection that says nothing holds no thread for ever

    def __init__(self, folder: Path, token: str, reader: Reader, *words: object) -> None:
        self.folder, self.token, self.reader = folder, token, reader
        super().__init__(*words)  # pyright: ignore[reportArgumentType] - the server's own three

    def do_GET(self) -> None:
        """The page, or the rows from a place on."""
        host = (self.headers.get("Host") or "").rpartition(":")
        if (host[0] if host[2].isdigit() else "".join(host)) not in HOSTS:
            return self._answer(403, "text/plain", "This address is for this machine alone.\n")
        path, _, query = self.path.partition("?")
        known, _, rest = path.removeprefix("/").partition("/")
        if not secrets.compare_digest(known.encode(), self.token.encode()):
            rest = None
        if rest == "" and path.endswith("/"):
            made, policy = page_of(self.folder.resolve().name)
            return self._answer(200, "text/html", made, policy)
        if rest == "rows":
            return self._answer(200, "application/json", json.dumps(self._rows(query)))
        return self._answer(404, "text/plain", "There is nothing here.\n")

    def _rows(self, query: str) -> dict[str, Json]:
        asked = parse_qs(query)
        state = state_of(self.folder, self.reader.rows())
        same = asked.get("life", [""])[0] in ("", state["life"])
        text = asked.get("from", ["0"])[0]
        place = int(text) if same and text.isascii() and text.isdigit() else 0
        start, end, rows, more = new_rows(self.folder / "metrics.jsonl", place)
        return {**state, "from": start, "to": end, "rows": rows, "more": more}

    def _answer(self, code: int, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        data = text.encode("utf-8", "replace")
        self.send_response(code)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(data))),
            ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"), ("Content-Security-Policy", policy),
            *[("Allow", "GET")] * (code == 405),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if self.command != "HEAD" else b"")

    def refuse(self) -> None:
        """Whatever would change something."""
        self.close_connection = True
        self._answer(405, "text/plain", "Only GET.\n")

    def log_message(self, *words: object) -> None:
        """A terminal is no access log, and the token is nobody else's."""


for _name in REFUSED:
    setattr(Handler, f"do_{_name}", Handler.refuse)


def serve(folder: Path, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server on the loopback, and its address; UserError where the port is taken."""
    token = secrets.token_urlsafe(24)
    try:
        handler = partial(Handler, folder, token, Reader(folder))
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "must be a number from 0 to 65535"
        raise UserError(
            f"--port {port}: {why}; without --port a free one is taken", code="port"
        ) from None
    server.daemon_threads = True
    return server, f"http://127.0.0.1:{server.server_port}/{token}/"


def command(folder: Path, port: int = 0) -> int:
    """`python -m report live`: serves until Ctrl-C."""
    if read_json(folder / "config.json") is None:
        raise UserError(f"{folder} holds no run: it has no readable config.json", code="no-run")
    server, address = serve(folder, port)
    here, user = server.server_port, "USER"
    with contextlib.suppress(OSError, KeyError):  # a container whose user has no name
        user = getpass.getuser()
    print(f"live    {address}")
    print(f"tunnel  ssh -N -L {here}:127.0.0.1:{here} {user}@{socket.gethostname()}"
          "  # on your own machine, where the address above works then")  # fmt: skip
    print("Ctrl-C ends it; the run does not notice", flush=True)

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)  # a shell's background job ignores it
    signal.signal(signal.SIGTERM, end)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\nended; {printable(folder)} was only read", flush=True)
    finally:
        server.server_close()
    return FINISHED
