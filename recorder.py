"""What a run really did, shard by shard, for those who compare runs: LOCKSTEP_RECORD=FOLDER.

Attached from outside the loop, so the recorded run is the ordinary one. Each process appends JSON
lines to FOLDER/rank-<n>.jsonl: {"step", "shard", "indices", "pixels", "loss"} for each of its
shards, {"evaluated", "state"} for each evaluation, a digest of the weights and buffers it used,
and {"step", "norm", "weights"} for each update (rank 0).
"""

import hashlib
import json
from pathlib import Path

import torch


def digest(tensors) -> str:
    """blake2b of the tensors' bytes, whatever their memory layout."""
    state = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def attach(run, folder: str) -> None:
    """Make `run` write down what it does; called once everything is prepared."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    file = (path / f"rank-{run.accelerator.process_index}.jsonl").open("a", encoding="utf-8")
    original, seen = run.shards.__call__, {}

    def write(row: dict) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()

    def shards(batch, step):
        before = run.sums.clone()
        for shard, part in enumerate(original(batch, step), run.shards.first):
            yield part
            loss = float(run.sums[shard] - before[shard])
            indices = part["indices"].tolist()
            row = {"step": step, "shard": shard, "indices": indices, "loss": loss}
            write(row | {"pixels": seen["pixels"]})

    def before_forward(module, inputs):
        if module.training:
            seen["pixels"] = digest(inputs)
        elif not torch.is_grad_enabled() and seen.get("evaluated") != run.progress.step:
            seen["evaluated"] = run.progress.step
            write({"evaluated": run.progress.step, "state": digest(module.state_dict().values())})

    def before_update(optimizer, args, kwargs):
        gradients = [p.grad for p in run.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        weights = digest(run.bare.state_dict().values())
        write({"step": run.progress.step, "norm": norm, "weights": weights})

    class Recorded(type(run.shards)):
        def __call__(self, batch, step):
            return shards(batch, step)

    run.shards.__class__ = Recorded
    for module in (run.bare, *([run.average.model] if run.average else [])):
        module.register_forward_pre_hook(before_forward)
    if run.is_main:
        run.optimizer.optimizer.register_step_pre_hook(before_update)


def read(folder: str | Path) -> tuple[dict, dict]:
    """({(step, shard): row}, {step: row}) of all processes; a row written twice counts once."""
    shards, updates, _ = read_all(folder)
    return shards, updates


def read_all(folder: str | Path) -> tuple[dict, dict, dict]:
    """Like `read`, and {step: digests of what the processes evaluated with}."""
    shards, updates, evaluated = {}, {}, {}
    for path in sorted(Path(folder).glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "shard" in row:
                shards[row["step"], row["shard"]] = row
            elif "evaluated" in row:
                evaluated.setdefault(row["evaluated"], set()).add(row["state"])
            else:
                updates[row["step"]] = row
    return shards, updates, evaluated
