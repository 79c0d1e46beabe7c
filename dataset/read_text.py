"""A text file as a whole."""

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """A file in UTF-8 as it is, line ends too, without its byte order mark.

    Raises:
        ValueError: `file: reason` or `file:line: reason`: it is empty, or no text in UTF-8, and
            what to do about it.
    """
    if path.exists() and not path.is_file():  # to open a pipe would wait for whoever writes to it
        raise ValueError(f"{path}: not a file")
    raw = path.read_bytes()
    content = raw.removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise ValueError(f"{path}: there is no text in it")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        from dataset.file_kinds import check_kind, not_utf8

        check_kind(path, "text")
        line = content.count(b"\n", 0, error.start) + 1
        offset = error.start + len(raw) - len(content)
        fault = f"byte 0x{content[error.start]:02x} is not UTF-8; {not_utf8(path, offset)}"
        raise ValueError(f"{path}:{line}: {fault}") from None
    if "\0" in text:
        from dataset.file_kinds import check_kind

        check_kind(path, "text")
    return text
