"""Run as every rank: how much memory the start of a shared model takes, and whether its values are
right.

Usage: share_model.py WHOLE.pth [flags of train_full_sft.py]; WHOLE has the values that are expected
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from model.lm import MiniMindLM
from runtime import parallel
from runtime.start import open_start
from trainer import train_full_sft as sft


def peak_of(start) -> int:
    """Most bytes that tensors had at once while `start` ran, beyond those of before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        start()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")


def main() -> None:
    whole = torch.load(sys.argv.pop(1), weights_only=True)
    args = sft.parse_args()
    start = open_start(args, "pretrain")
    args.device = sft.init_distributed_mode(args)
    parallel.make_mesh(args.device, args.strategy, 1, args.tensor_parallel)
    sft.setup_seed(args.seed)
    models = []

    def build() -> None:
        make = functools.partial(MiniMindLM, start.config)
        model = start.build(make, args)
        models.append(parallel.wrap(model, args, "float32", 8, start.fill))

    config = start.config
    peak = peak_of(build)
    for name, p in models[0].state_dict().items():
        value = p.full_tensor() if hasattr(p, "full_tensor") else p
        assert torch.equal(value, whole[name]), name
    assert (
        models[0].lm_head.weight is models[0].model.embed_tokens.weight or not config.tie_embeddings
    )
    size = sum(value.nbytes for value in whole.values())
    size -= whole["lm_head.weight"].nbytes if config.tie_embeddings else 0
    largest = max(value.nbytes for value in whole.values())
    print(json.dumps({"peak": peak, "size": size, "largest": largest}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
