"""One entry for every stage: picks the script that --algorithm means and runs it in this process.

    python main.py --algorithm sft --config sft.yaml
    torchrun --nproc_per_node 2 main.py --mode train --algorithm sft --config config_distributed_example.yaml
    deepspeed --num_gpus 2 main.py --mode train --algorithm sft --config config_deepspeed_example.yaml

All other flags go to that script; `python trainer/train_full_sft.py --help` lists them. Started as
several processes, it gets --ddp. A file with `distributed_strategy: deepspeed`, or
--deepspeed_config, means the script for DeepSpeed.
"""

import argparse
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from runtime.launcher import die_with_launcher, read_launch

die_with_launcher()  # before the imports, which take seconds

from runtime import config, launch

ALGORITHMS = {
    "pretrain": "train_pretrain.py",
    "sft": "train_full_sft.py",
    "lora": "train_lora.py",
    "rm": "train_reward.py",
    "ppo": "train_ppo.py",
    "dpo": "train_dpo.py",
    "grpo": "train_grpo.py",
}
# Engines that train in a way of their own, with scripts of their own.
ENGINES = {
    "deepspeed": {"sft": "engines/train_sft_deepspeed.py"},
    "accelerate": {"sft": "engines/train_sft_accelerate.py"},
}


def stage_script(algorithm: str, engine: str = "torchrun") -> Path:
    """The script of an algorithm.

    Raises:
        ValueError: this version has none.
    """
    scripts = ENGINES.get(engine, ALGORITHMS)
    if algorithm not in scripts:
        raise ValueError(
            f"engine {engine} trains {', '.join(scripts)} only, not {algorithm}: take --strategy"
            " zero2"
        )
    path = ROOT / "trainer" / scripts[algorithm]
    if not path.is_file():
        there = [name for name, script in scripts.items() if (ROOT / "trainer" / script).is_file()]
        raise ValueError(
            f"--algorithm {algorithm}: there is no trainer/{path.name}; there is {', '.join(there)}"
        )
    return path


def settings(argv: list[str]) -> dict[str, object]:
    """Flag -> value as the --config file of a command line has them, texts, unchecked."""
    path = config.config_path(argv)
    entries = config.read_config(path) if path else []
    return {config.ALIASES.get(entry.key, entry.key): entry.value for entry in entries}


def choose_engine(argv: list[str]) -> str:
    """'deepspeed' where a command line or its --config file asks for it, otherwise 'torchrun'."""
    asked = any(word.split("=")[0] == "--deepspeed_config" for word in argv)
    return "deepspeed" if asked or settings(argv).get("strategy") == "deepspeed" else "torchrun"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument("--mode", choices=("train",), default="train", help="what to do")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="sft", help="the stage")
    args, argv = parser.parse_known_args()
    script = stage_script(args.algorithm, choose_engine(argv))
    alone = config.SWITCH.get(str(settings(argv).get("ddp")).lower()) is False
    if read_launch().world_size > 1 and "--ddp" not in argv and not alone:
        argv.append("--ddp")
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    launch.run(main)
