"""Take weights to other programs and back: Hugging Face's format, GGUF, PEFT.

WEIGHTS is a .pth file, a stage (its newest run) or run in --out_dir, or a folder in Hugging Face's
format.

    python scripts/convert.py to-hf full_sft FOLDER                 # transformers, vLLM, other trainers
    python scripts/convert.py to-hf full_sft FOLDER --lora lora     # with an adapter merged
    python scripts/convert.py to-hf full_sft FOLDER --lora lora --peft    # the adapter alone, for peft
    python scripts/convert.py from-hf FOLDER out/NAME.pth
    python scripts/convert.py merge full_sft out/NAME.pth --lora lora
    python scripts/convert.py to-gguf full_sft FILE.gguf            # llama.cpp, Ollama
    python scripts/convert.py check FOLDER_OR_FILE full_sft         # does it compute the same there?
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import launch

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def to_hf(args: argparse.Namespace) -> int:
    from runtime.exports.hf_folder import export_hf

    folder = Path(args.folder)
    if args.peft:
        return to_peft(args, folder)
    size = re.fullmatch(r"(\d+)(|KB|MB|GB)", args.shard_size)
    if not size or not int(size[1]):
        raise ValueError(f"--shard_size {args.shard_size}: wanted is a size such as 5GB or 200MB")
    source = open_weights(args)
    shard_size = int(size[1]) * UNITS[size[2]]
    export_hf(source.config, source.tensors, source.tokenizer, folder, args.dtype, shard_size)
    print(f"{source.path}{merged(args)} as {args.dtype}: {folder}")
    return 0


def to_peft(args: argparse.Namespace, folder: Path) -> int:
    from model.lora import merge_adapter, write_peft
    from model.newest import newest_weights
    from model.weights import load_model
    from runtime.saving.store import naming

    if args.lora is None:
        raise ValueError("--peft: name the adapter with --lora")
    adapter = newest_weights(args.lora, args.out_dir, "--lora")
    base = newest_weights(args.weights, args.out_dir, "WEIGHTS")
    merge_adapter(load_model(base), adapter)  # says whether the two belong together
    with naming(folder):
        write_peft(adapter, folder, str(base) if base.is_dir() else base.stem)
    print(f"{adapter} for peft: {folder}")
    return 0


def from_hf(args: argparse.Namespace) -> int:
    from model.hf import resolve_folder

    args.weights = str(resolve_folder(args.folder, "from-hf"))
    return write_weights(args)


def merge(args: argparse.Namespace) -> int:
    if args.lora is None:
        raise ValueError("merge: name the adapter with --lora")
    return write_weights(args)


def write_weights(args: argparse.Namespace) -> int:
    """Write a model as NAME.pth with NAME.json."""
    from dataclasses import replace

    from dataset.tokenizer import record_of
    from runtime.checkpoint import save_file
    from runtime.exports.file_bar import file_bar

    out = Path(args.out)
    if out.suffix != ".pth" or not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: must be a .pth file in a folder that exists")
    if out.exists():
        raise ValueError(f"{out}: is there already; name another file, or remove it")
    source = open_weights(args)
    config = replace(source.config, tokenizer=record_of(source.tokenizer))
    state = source.state_dict()
    size = sum(tensor.nbytes for tensor in state.values())
    with file_bar(out.with_name(f".tmp-{out.name}"), size):  # save_file's, until it is whole
        save_file(out, state)  # first: the one that a full disk stops
    save_file(out.with_suffix(".json"), config.to_json())
    print(f"{source.path}{merged(args)}: {out}")
    return 0


def to_gguf(args: argparse.Namespace) -> int:
    from runtime.exports.gguf_file import export_gguf

    source = open_weights(args)
    export_gguf(source, Path(args.file), args.dtype)
    print(f"{source.path}{merged(args)} as {args.dtype}: {args.file}")
    return 0


def check(args: argparse.Namespace) -> int:
    export = Path(args.export)
    if not export.exists():
        raise ValueError(f"{export}: no such file or folder")
    source = open_weights(args)
    if export.is_dir():
        from runtime.exports.compare_hf import check_hf

        same, lines = check_hf(export, source)
    else:
        from runtime.exports.compare import check_gguf

        same, figures = check_gguf(export, source)
        lines = [str(figures)]
    for line in lines:
        print(line)
    print(f"{export}: {'the same as' if same else 'DIFFERS from'} {source.path}{merged(args)}")
    return 0 if same else 1


def open_weights(args: argparse.Namespace):
    """The weights that a command line names, with its adapter merged, as a `Source`."""
    from runtime.exports.source import open_source

    options = (args.tokenizer_dir, args.chat_template, args.lora, args.out_dir)
    return open_source(args.weights, *options)


def merged(args: argparse.Namespace) -> str:
    return f" with {args.lora}" if args.lora else ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = launch.usage_error
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, about: str, *places: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.error = launch.usage_error
        for place in places:
            sub.add_argument(place)
        sub.add_argument("--out_dir", default=str(ROOT / "out"), help="where runs are looked for")
        sub.add_argument("--tokenizer_dir", help="instead of the tokenizer that the weights name")
        sub.add_argument("--chat_template", help="a file; instead of the weights' own template")
        if name != "from-hf":
            sub.add_argument("--lora", help="an adapter to merge: stage, run or path")
        sub.set_defaults(run=run, lora=None)
        return sub

    one = command("to-hf", to_hf, "write a folder in Hugging Face's format", "weights", "folder")
    one.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    one.add_argument("--shard_size", default="5GB", help="of one file of weights at most")
    one.add_argument("--peft", action="store_true", help="write the adapter alone, for peft")
    command("from-hf", from_hf, "write NAME.pth of a folder or a hub name", "folder", "out")
    command("merge", merge, "write NAME.pth with an adapter merged", "weights", "out")
    one = command("to-gguf", to_gguf, "write a GGUF file and a Modelfile", "weights", "file")
    one.add_argument("--dtype", default="f16", choices=("f32", "f16", "bf16", "q8_0"))
    command("check", check, "compare with transformers or llama.cpp", "export", "weights")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    launch.check_flags(vars(args))
    return args.run(args)


if __name__ == "__main__":
    launch.run(main)
