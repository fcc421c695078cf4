"""What all tests share: no network, one thread, tiny learners' models, real launches."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from launches import COUNTED, DIFFERED, HIDDEN, ORDINARY, environment

os.environ |= HIDDEN  # before torch looks
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ORDINARY |= environment()


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=20, help="lives of the chaos soak")


@pytest.fixture(autouse=True)
def clean_process():
    """What Accelerate and others leave in the environment, and who waits for signals, ends here."""
    before = dict(os.environ)
    # Under nohup or in the background these are ignored, by all that is launched too.
    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            with contextlib.suppress(OSError):  # those that nobody can wait for
                signal.signal(number, handler)
    theirs = {name: value for name, value in os.environ.items() if name.startswith("PYTEST_")}
    os.environ.clear()
    os.environ.update(before | theirs)


def pytest_sessionfinish(session):
    """A worker hands its launches to the one that sums up."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = COUNTED
        session.config.workeroutput["differed"] = sorted(DIFFERED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What a worker handed over; nothing, if it died."""
    output = getattr(node, "workeroutput", {})
    for kind, count in output.get("launches", {}).items():
        COUNTED[kind] += count
    DIFFERED.update(output.get("differed", ()))


def pytest_terminal_summary(terminalreporter):
    """How launches were made: a difference of environments can make every one a cold one."""
    if any(COUNTED.values()):
        counts = " and ".join(f"{count} {kind}" for kind, count in COUNTED.items())
        names = f" ({', '.join(sorted(DIFFERED))})" if DIFFERED else ""
        terminalreporter.write_line(f"launches: {counts}{names}")


PLAIN = '''
from torch import nn

class Net(nn.Module):
    """No batch norm, no dropout."""
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 16, num_classes),
        )
    def forward(self, x):
        return self.body(x)
'''
FULL = '''
from torch import nn

class Net(nn.Module):
    """Batch norm and dropout."""
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * 16, num_classes),
        )
    def forward(self, x):
        return self.body(x)
'''


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> Path:
    """A folder with two learners' files, plain.py:Net and full.py:Net, for images of 16 pixels."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "plain.py").write_text(PLAIN)
    (folder / "full.py").write_text(FULL)
    return folder
