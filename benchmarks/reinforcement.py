"""Do PPO and GRPO work: exact match on held-out prompts of a task that the model of
scripts/quickstart.sh is bad at.

The task (`ties` in dataset/demo_tasks.py) is to sort three numbers of two digits; in half of the
prompts two begin with the same digit, as they never do in the SFT data. Makes prompts enough that
none is learned by heart, trains as a user would, and prints the share of
dataset/demo/rl_held_out.jsonl that is answered exactly, greedily, before and after. Ends with exit
code 0 if GRPO takes it from at most 60 % to at least 90 %, and PPO up by at least 25 points.

    python benchmarks/reinforcement.py grpo
    python benchmarks/reinforcement.py ppo
    python benchmarks/reinforcement.py grpo --loss_type gspo --max_steps 50     # more flags go to the stage
"""

import sys
import tempfile
from pathlib import Path

from demo_model import SHAPE, arguments, exact_match, run

COMMON = (
    "--dtype float32 --epochs 9 --max_new_tokens 32 --temperature 1.5 --optimizer muon"
    " --sample_interval 50"
)
RECIPES = {
    "grpo": "--max_steps 200 --batch_size 64 --group_size 8 --learning_rate 1.5e-3",
    "ppo": (
        "--max_steps 160 --batch_size 256 --ppo_epochs 2 --mini_batches 2 --kl_beta 0.01"
        " --learning_rate 1e-3"
    ),
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("stage", choices=RECIPES)
    parser.add_argument("--prompts", type=int, default=4000, help="prompts to learn from")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        run("dataset/make_demo.py", "--out_dir", scratch / "data", "--rl_prompts", args.prompts)
        (before,) = exact_match(scratch, "rl_held_out", "--weight", args.weight).values()
        flags = [
            *SHAPE,
            *COMMON.split(),
            *RECIPES[args.stage].split(),
            "--from_weight",
            args.weight.resolve(),
        ]
        flags += ["--data_path", scratch / "data/rl_prompts.jsonl", "--out_dir", scratch, *more]
        seconds = run(f"trainer/train_{args.stage}.py", *flags)
        (after,) = exact_match(
            scratch, "rl_held_out", "--weight", scratch / f"{args.stage}_192.pth"
        ).values()
    print(
        f"{args.stage}, {seconds:.0f} s: exact match on held-out prompts {before:.1f} % ->"
        f" {after:.1f} %"
    )
    return (
        0 if (before <= 60 and after >= 90 if args.stage == "grpo" else after - before >= 25) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
