"""Who makes the rows: starts them while there is room, hears of their ends, stops them."""

import os
import shutil
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING

from common.cpus import cpus
from common.errors import USER_ERROR
from config.rows import Rows
from many.folder import Turn, last_words
from many.starts import has_threads, warm_interpreter

if TYPE_CHECKING:
    from many.starts import Process, Start
    from report.board import Board

LOOK_SECONDS = 0.2


_ALSO = [
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]


class Crew:
    """Starts rows while there is room, hears of their ends, and stops them when it is asked to."""

    def __init__(
        self, rows: Rows, left: list[Turn], beside: int, devices: list[str], board: "Board"
    ) -> None:
        self.rows, self.left, self.beside, self.devices = rows, left, beside, devices
        self.board = board
        # Of so many as were asked for, however many are left: on a CPU the bits depend on it.
        self.share = min(rows.side_by_side or 1, len(rows.rows))
        self.running: dict[int, tuple[Turn, Process]] = {}  # by place
        self.asked = 0  # how often a signal asked to stop

    def work(self) -> None:
        """Until no row is left, or all have stopped."""
        waiting, passed_on = iter(self.left), False
        handlers = {
            number: signal.signal(number, self._stop)
            for number in (signal.SIGINT, signal.SIGTERM, *_ALSO)
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN  # nohup
        }
        try:
            with warm_interpreter() as start:
                while self.asked < 2:
                    while not self.asked and len(self.running) < self.beside:
                        if (turn := next(waiting, None)) is None:
                            break
                        self._begin(turn, start)
                    if not self.running:
                        break
                    time.sleep(LOOK_SECONDS)
                    if self.asked and not passed_on:
                        passed_on = True  # once: a second signal is no other wish
                        for _, process in self.running.values():
                            process.terminate()
                    self._hear()
                    self.board.tick()
                for turn, process in self.running.values():
                    process.kill()
                    turn.look()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # A word only: a row may just be starting, or the interpreter be telling of one.
        self.asked += 1

    def _begin(self, turn: Turn, start: "Start") -> None:
        turn.place = next(n for n in range(self.beside) if n not in self.running)
        words, environment = self.rows.words(turn.row), dict(os.environ)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[turn.place % len(self.devices)]
        elif self.share > 1 and not has_threads(words, turn.folder):
            words += ["--threads", str(max(1, cpus() // self.share))]
        turn.state, turn.reason, turn.began = "runs", "", time.monotonic()
        self.running[turn.place] = turn, start(words, turn.output, environment)
        self.board.started(turn)

    def _hear(self) -> None:
        for place, (turn, process) in list(self.running.items()):
            turn.seconds = time.monotonic() - turn.began
            if (status := process.poll()) is None:
                continue
            del self.running[place]
            turn.look()
            if turn.state not in ("finished", "stopped") or status == USER_ERROR:
                turn.state = "stopped" if self.asked and status != USER_ERROR else "failed"
                if status == USER_ERROR or not turn.reason:  # else its status.json told
                    turn.reason = last_words(turn.output, status)
            elif turn.state == "finished" and not self.rows.keep:
                shutil.rmtree(turn.folder / "checkpoints", ignore_errors=True)
                (turn.folder / "last.safetensors").unlink(missing_ok=True)
            self.board.ended(turn)
