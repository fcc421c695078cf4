"""Laws for a machine with a GPU, `pytest -m gpu`: the rows of bench.gpu that say right or wrong."""

import os
import subprocess
import sys

import pytest
from launches import REPOSITORY, SEEN

from bench.gpu import CHECKS, FAIL, LATE, ROWS, measured

pytestmark = pytest.mark.gpu
LAWS = [row for row in ROWS if row.room == CHECKS]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """All rows, measured in processes of their own: no fault of one reaches the others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SEEN.items():
            patch.delenv(name) if value is None else patch.setenv(name, value)
        words = [sys.executable, "-c", "import torch; raise SystemExit(torch.cuda.device_count())"]
        if not subprocess.run(words, cwd=REPOSITORY, timeout=240).returncode:
            pytest.skip("torch sees no GPU on this machine")
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == SEEN["CUDA_VISIBLE_DEVICES"]
        return measured(LAWS, tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("row", [row.title for row in LAWS])
def test_on_a_gpu(row, found):
    assert found[row]["verdict"] not in (FAIL, LATE), found[row]
