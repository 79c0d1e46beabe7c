"""Train the tokenizer: a byte-level BPE that round-trips exactly, with the chat template inside.

Reads    text files and JSON or JSONL rows of any schema (every string of a row counts as text)
Writes   {out_dir}/tokenizer.json, tokenizer_config.json and chat_template.jinja, which
         AutoTokenizer loads
Command  python trainer/train_tokenizer.py --data_path corpus.jsonl dialogs.json notes.txt
Measure  python trainer/train_tokenizer.py --report FILE...     bytes per token of the tokenizer in
         --out_dir

The same files in the same order give the same bytes. A file that is named twice counts twice, which
is how a small language is given its share of the vocabulary.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.chat_template import CHAT_TEMPLATE, IM_END, IM_START, MARKERS
from dataset.file_kinds import check_kind, not_utf8
from runtime.flags import check_flags, usage_error
from runtime.process import exits

# Ids 0 to 15, in this order. Weights depend on them: append by using up a reserved one, never
# insert.
PAD, BOS, EOS = "<|endoftext|>", IM_START, IM_END
SPECIAL_TOKENS = [PAD, BOS, EOS, *MARKERS]
SPECIAL_TOKENS += [f"<|reserved_{n}|>" for n in range(16 - len(SPECIAL_TOKENS))]
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
# Chinese has no blanks, so a sentence that is frequent in the data would become one entry. Five Han
# fit into 16 bytes.
MAX_TOKEN_BYTES = 16

# Where a token must end: first around each newline, each digit, each word and each run of
# punctuation (both with one blank before them), then around each run of CJK. A newline is always on
# its own, so "user\n" + content is tokenised as two segments whatever the content is. The pieces
# are those of llama.cpp's pre-tokenizer "deepseek-coder" (a test holds them equal), so a model with
# this tokenizer can be exported to it as it is.
SPLITS = (r"[\r\n]|\p{N}|[^\S\r\n]?(?:\p{L}+|\p{P}+)", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file: the joined strings of a row, or the blocks of what is not JSON.

    Raises:
        ValueError: no such file, not UTF-8 or no text (and how to convert it), broken JSON (with
        its line).
    """
    expected = {".json": "rows", ".jsonl": "rows", ".txt": "lines"}.get(path.suffix, "text")
    try:
        check_kind(path, expected)
        raw = path.read_bytes()
        content = (
            raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        )
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"{path}:{line}: byte 0x{raw[error.start]:02x}"
        raise ValueError(f"{where} is not UTF-8; {not_utf8(path, error.start)}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    found = False
    for text in _texts(path, content):
        if text:
            found = True
            yield text
    if not found:
        raise ValueError(f"{path} has no text in it")


def _texts(path: Path, content: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield "\n".join(_strings(_parse(line, f"{path}:{number}")))
    elif path.suffix == ".json":
        rows = _parse(content, str(path))
        yield from (
            "\n".join(_strings(row)) for row in (rows if isinstance(rows, list) else [rows])
        )
    else:
        yield from re.split(
            r"(?<=\n)(?=\S)", content
        )  # a block: a line and the indented ones below it


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _strings(value) -> Iterator[str]:
    """Every string under a JSON value, in order; a half surrogate pair is replaced."""
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode("utf-8")
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def split_held_out(texts: Iterator[str], hold_out: int, held: bool) -> Iterator[str]:
    """Every hold_out-th text (held) or all the others; hold_out 0: both are all texts."""
    return (t for n, t in enumerate(texts, 1) if not hold_out or (n % hold_out == 0) == held)


# --------------------------------------------------------------------------------------------------
# Training and measuring
# --------------------------------------------------------------------------------------------------


def train_bpe(texts: Iterator[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """Train a byte-level BPE: all 256 bytes are entries, so decode(encode(x)) == x for any text.

    Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units",
    algorithm 1, on bytes as in Radford et al. 2019 (GPT-2), section 2.2.
    """
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL_TOKENS,
        max_token_length=MAX_TOKEN_BYTES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Markers are part of what a model says: to decode with skip_special_tokens=True must not take
    # them away.
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in MARKERS
    return Tokenizer.from_str(json.dumps(spec))


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write the three files that AutoTokenizer.from_pretrained(out_dir) reads."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,  # the model knows its own limit and names it
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():  # written beside and renamed: never half a file
            beside = out_dir / f".{name}.tmp"
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, out_dir / name)
    except OSError as error:
        raise ValueError(f"cannot write to --out_dir {out_dir}: {error.strerror}") from None


def report(tokenizer: Tokenizer, paths: list[Path], hold_out: int) -> None:
    """Print bytes per token on the held-back texts of each file."""
    print(f"{'bytes':>10} {'tokens':>9} {'bytes/token':>12}  file")
    for path in paths:
        texts = list(split_held_out(read_texts(path), hold_out, held=True))
        if not texts:  # fewer than hold_out texts
            continue
        size = sum(len(text.encode("utf-8")) for text in texts)
        tokens = sum(
            len(encoding)
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        )
        print(f"{size:>10,} {tokens:>9,} {size / tokens:>12.3f}  {path.name}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer with the chat template inside."
    )
    parser.error = usage_error
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=None,
        help="text, .json or .jsonl files; named twice counts twice (default: the demo text)",
    )
    data.add_argument(
        "--hold_out",
        type=int,
        default=20,
        metavar="N",
        help=(
            "keep every N-th text of a file out of training, to measure on (0: train on all of it)"
        ),
    )
    model = parser.add_argument_group("tokenizer")
    model.add_argument(
        "--vocab_size", type=int, default=6400, help=f"entries in all, at least {MIN_VOCAB_SIZE}"
    )
    model.add_argument(
        "--min_frequency",
        type=int,
        default=2,
        help="how often a pair must occur to become an entry",
    )
    model.add_argument(
        "--out_dir",
        type=Path,
        default=ROOT / "model" / "minimind_tokenizer",
        help="folder the tokenizer is written to, or read from with --report alone",
    )
    measure = parser.add_argument_group("measuring")
    measure.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=None,
        help=(
            "measure on these files instead of the training files; without --data_path only measure"
        ),
    )
    return parser.parse_args()  # fmt: skip


def main() -> None:
    args = parse_args()

    # 1. Check the numbers
    check_flags(vars(args))
    if args.vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"--vocab_size {args.vocab_size} is below {MIN_VOCAB_SIZE}, the special tokens and 256"
            " bytes"
        )
    if args.hold_out == 1:
        raise ValueError(
            "--hold_out 1 would leave nothing to train on: 0 keeps nothing out, 2 every second text"
        )

    # 2. Only measure
    if args.report and not args.data_path:
        if not (args.out_dir / "tokenizer.json").is_file():
            raise ValueError(f"no tokenizer.json in --out_dir {args.out_dir}: train one first")
        report(
            Tokenizer.from_file(str(args.out_dir / "tokenizer.json")), args.report, args.hold_out
        )
        return

    # 3. Train
    paths = args.data_path or [
        ROOT / "dataset" / "demo" / name for name in ("pretrain.jsonl", "sft.jsonl")
    ]
    texts = (
        text
        for path in paths
        for text in split_held_out(read_texts(path), args.hold_out, held=False)
    )
    tokenizer = train_bpe(texts, args.vocab_size, args.min_frequency)
    entries = tokenizer.get_vocab_size()
    if entries < args.vocab_size:
        raise ValueError(
            f"--vocab_size {args.vocab_size}: the data gives {entries} entries only, add data or"
            " lower it"
        )

    # 4. Save
    save_tokenizer(tokenizer, args.out_dir)
    print(f"{entries} entries -> {args.out_dir}")

    # 5. Measure
    report(tokenizer, args.report or list(dict.fromkeys(paths)), args.hold_out)


if __name__ == "__main__":
    exits.run(main)
