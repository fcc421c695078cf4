"""One law over the craft: whatever is chosen, the same run on 1 and 2 processes and after a kill.

With --bitwise, so that the checkpoints of a run on two processes that was killed and resumed are
those of the undisturbed run on one, byte for byte.
"""

import pytest
from launches import SMALL, same_after_a_kill
from safetensors.torch import load_file
from test_optim import OWN

COMMON = [*SMALL, "--batch-size", "60", "--limit", "300", "--epochs", "3", "--shards", "2"]
COMMON += ["--bitwise", "--checkpoint-every", "4", "--augment", "crop"]
OWN_LOSS = "my_loss.py:Each"
WAYS = {
    "bce-weights-mixup": "--loss bce --class-weights balanced --mixup 0.4 --label-smoothing 0.1",
    "focal-given-weights": "--loss focal --class-weights 1,2,3,4,5,1,2,3,4,5",
    "own-loss": f"--loss {OWN_LOSS} --class-weights balanced",
    "balanced-order": "--sampler balanced",
    "many-labels": "--task multilabel --mixup 0.4 --loss focal --label-smoothing 0.1",
    **{
        name: f"--optimizer {name} --lr 0.002 --weight-decay 0.1"
        for name in ("lion", "nadamw", "lamb", "rmsprop")
    },
    "schedule-free": "--optimizer schedule_free --lr 0.004 --schedule constant --warmup 1",
    "own-optimizer": "--optimizer my_optim.py:Counts --lr 0.02 --schedule one_cycle",
    "plateau-and-patience": "--schedule plateau --plateau 1 --patience 2 --lr 1e-9 --epochs 9",
}
FAST = {"bce-weights-mixup", "schedule-free", "many-labels"}
CODE = """
from torch import nn
from torch.nn import functional as F

class Each(nn.Module):
    def forward(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="none").sqrt()
"""


@pytest.fixture
def folder(nets):
    (nets / "my_loss.py").write_text(CODE)
    (nets / "my_optim.py").write_text(OWN)
    return nets


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=() if w in FAST else pytest.mark.slow) for w in WAYS]
)
def test_the_same_run_on_two_processes_one_of_which_is_killed(folder, way):
    flags = ["--model", "full.py:Net", *COMMON, *WAYS[way].split()]
    _, broken = same_after_a_kill(folder, flags, way, step=9)
    if way == "schedule-free":  # evaluated with statistics of its own, of eight batches
        kept = load_file(broken / "model.safetensors")
        assert kept["body.1.num_batches_tracked"] == 8 and kept["body.1.running_mean"].any()
