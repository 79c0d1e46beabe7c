"""Tokenise a data file once, into arrays on disk that training maps into memory.

A cache is a folder named by a hash of everything its content depends on: the bytes of the data
file, the tokenizer and the options. It is built beside its place and renamed into it when complete,
under a lock: a killed build leaves nothing that could be taken for a cache, and of several
processes one builds while the others wait.

Every row has a checksum, which is compared whenever the row is read, and so has every small file,
when the cache is opened. A cache that is not what was written is built again: at once, or by the
next start where it is found in a run.
"""

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from dataset.checksums import remember
from dataset.tokenizer import LazyTokenizer

VERSION = 2  # raise it when the meaning of the cached arrays changes
LARGE = 1 << 24  # bytes of a data file that takes long to read, so that its hash is kept


def cache_key(data_path: Path, cache_dir: Path, options: list) -> str:
    """The name of the cache of a data file.

    Args:
        cache_dir: where caches live; made if it is not there.
        options: all besides the file's bytes that the content depends on (tokenizer, lengths, ...).

    Raises:
        ValueError: there is no such file; the file or the folder cannot be used.
    """
    if not data_path.is_file():
        fault = "not a file" if data_path.exists() else "no such data file"
        raise ValueError(f"{data_path}: {fault}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        content = file_hash(data_path, cache_dir)
    except OSError as error:
        fault = f"cannot use {error.filename or cache_dir}: {error.strerror}"
        raise ValueError(f"{fault}; see --data_path and --cache_dir") from None
    parts = json.dumps([VERSION, content, *options], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def file_hash(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's content; that of a large file is kept in cache_dir."""
    if path.stat().st_size >= LARGE:
        from dataset.kept_hash import kept_hash

        return kept_hash(path, cache_dir)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def has_cache(folder: Path, report: bool = False) -> bool:
    """Whether there is a cache that is what was written; report: say so where it is not."""
    if not folder.exists():
        return False
    from dataset.cache_checks import is_whole

    return is_whole(folder, report)


def describe_tokenizer(tokenizer, cache_dir: Path) -> tuple[str, str]:
    """All that encoding depends on, as text: the tokenizer, its chat template.

    Of a `LazyTokenizer` that is remembered in cache_dir: a start with a warm cache loads none.
    """
    if not isinstance(tokenizer, LazyTokenizer):
        return tokenizer.backend_tokenizer.to_str(), json.dumps(tokenizer.chat_template)
    folder = tokenizer.folder
    files = sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")])
    parts = [version(name).encode() for name in ("transformers", "tokenizers")]
    parts += [path.read_bytes() for path in files if path.suffix in (".json", ".txt", ".jinja")]
    parts.append(tokenizer.given_template.encode())
    memo = cache_dir / f"tokenizer_{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.json"
    known = None
    if memo.exists():
        from dataset.cache_checks import recall

        known = recall(memo)
    if known is None:
        template = json.dumps(tokenizer.chat_template)
        text = tokenizer.backend_tokenizer.to_str()
        known = {"size": len(tokenizer), "text": text, "template": template}
        with suppress(OSError):  # what cannot be written is loaded next time, too
            cache_dir.mkdir(parents=True, exist_ok=True)
            remember(memo, known)
    tokenizer.size = known["size"]
    return known["text"], known["template"]
