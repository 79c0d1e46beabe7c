"""Make something else of an adapter of trainer/train_lora.py: whole weights, or a folder for peft.

Reads   the adapter of --lora and the weights of --weight that it was trained on.
Writes  plain weights with the adapter merged in (--merge), and what peft.PeftModel.from_pretrained
        loads (--peft).

    python scripts/export_lora.py --merge out/owl_192.pth     # then: python eval_model.py --weight owl
    python scripts/export_lora.py --peft out/owl_peft         # goes onto the exported base model
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.lora import merge_adapter, write_peft
from model.weights import load_model, newest_weights
from runtime import launch
from runtime.checkpoint import save_file
from runtime.process.terminal import naming


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument(
        "--lora", default="lora", help="the adapter: stage name (its newest), run name or path"
    )
    parser.add_argument(
        "--weight", default="full_sft", help="its base model: stage name, run name or path"
    )
    parser.add_argument("--out_dir", default=str(ROOT / "out"), help="where both are looked for")
    parser.add_argument(
        "--merge",
        metavar="FILE.pth",
        help="write whole weights to this file, their shape beside it",
    )
    parser.add_argument(
        "--peft", metavar="FOLDER", help="write adapter and configuration there, for peft"
    )
    args = parser.parse_args()
    launch.check_flags(vars(args))
    if not (args.merge or args.peft):
        raise ValueError("nothing to do: name a file with --merge, a folder with --peft, or both")
    if args.merge and not (
        args.merge.endswith(".pth") and Path(args.merge).absolute().parent.is_dir()
    ):
        raise ValueError(f"--merge {args.merge}: must be a .pth file in a folder that exists")
    adapter = newest_weights(args.lora, args.out_dir, "--lora")
    base = newest_weights(args.weight, args.out_dir)
    model = load_model(base)
    merge_adapter(model, adapter)  # also says whether the two belong together
    if args.merge:
        save_file(Path(args.merge).with_suffix(".json"), model.config.to_json())
        save_file(Path(args.merge), model.state_dict())
        print(f"{adapter.name} merged into {base.name}: {args.merge}")
    if args.peft:
        with naming(args.peft):
            write_peft(adapter, args.peft, base.stem)
        print(f"{adapter.name} for peft: {args.peft}")
    return 0


if __name__ == "__main__":
    launch.run(main)
