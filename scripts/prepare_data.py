"""Build token caches ahead of training: a run with the same flags finds its cache.

    python scripts/prepare_data.py --config configs/sft.yaml
    python scripts/prepare_data.py --stage pretrain --data_path corpus.jsonl --max_seq_len 2048
    srun --ntasks-per-node 1 python scripts/prepare_data.py --per_node 1 --cache_dir FOLDER_ON_A_LOCAL_DISK

All flags of the stage's training script are taken, so that its command line fits as it is. Several
processes at once are fine: on shared storage the first one builds; with --per_node 1 the first one
of every machine.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.cached_dataset import CACHE_DIR, CachedDataset, describe
from dataset.lm_dataset import SFTDataset
from dataset.pretrain_dataset import PretrainDataset
from runtime import launch
from runtime.distributed.environment import whole_number
from runtime.launcher import Launch, read_launch
from runtime.start import Start, open_start
from scripts.preflight import stage_flags

STAGES = {"pretrain": ("train_pretrain", PretrainDataset), "sft": ("train_full_sft", SFTDataset)}
# Whose configurations the plain script refuses
ENGINES = {f"sft_{engine}": (f"train_sft_{engine}", SFTDataset)
           for engine in ("deepspeed", "accelerate", "lightning", "pipeline")}  # fmt: skip


def open_stage(stage: str, args: argparse.Namespace) -> Start:
    """What the stage would start from, where it is there already; sets flags that follow from it."""
    return open_start(args, "none" if stage == "pretrain" else "pretrain", required=False)


def open_data(stage: str, args: argparse.Namespace, tokenizer) -> CachedDataset:
    """The dataset that the stage would train on; builds its cache where there is none."""
    options = {
        "cache_dir": args.cache_dir,
        "skip_bad": args.skip_bad,
        "curriculum": args.curriculum,
    }
    if hasattr(args, "loss_on"):
        options["loss_on"] = args.loss_on
    return (STAGES | ENGINES)[stage][1](args.data_path, tokenizer, args.max_seq_len, **options)


def slurm_task() -> Launch:
    """This process among the tasks that srun started, or the defaults."""
    names = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID"}
    numbers = {field: whole_number(name, 0) for field, name in names.items() if name in os.environ}
    return Launch(**numbers)


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument(
        "--stage", choices=STAGES | ENGINES, default="sft", help="whose script reads the data"
    )
    parser.add_argument(
        "--per_node",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: --cache_dir is local to a machine",
    )
    own, rest = parser.parse_known_args()
    launch.check_flags(vars(own))
    args = stage_flags(Path(f"trainer/{(STAGES | ENGINES)[own.stage][0]}.py"), rest)

    # One builds; the others have nothing to wait for here: training itself waits for a cache that
    # is being built.
    process = read_launch()
    if not process.launched:
        process = slurm_task()
    if (process.local_rank if own.per_node else process.rank) > 0:
        return 0
    cache_dir = Path(args.cache_dir or CACHE_DIR)
    before = set(cache_dir.iterdir()) if cache_dir.is_dir() else set()
    begin = time.monotonic()
    dataset = open_data(own.stage, args, open_stage(own.stage, args).tokenizer)
    folder, seconds = dataset.folder, time.monotonic() - begin
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{args.data_path}: {describe(dataset)}")
    print(
        f"{'found' if folder in before else 'built'} in {seconds:.1f} s: {folder},"
        f" {size / 1e6:,.1f} MB"
    )
    return 0


if __name__ == "__main__":
    launch.run(main)
