"""A close look at a flag whose value is not what it mostly is: names in any language, or mistakes."""

import math
import os
import re


def check_value(name: str, value: object, least: float, most: float) -> None:
    """Refuse a value that makes no sense.

    Args:
        least, most: what a number may be.

    Raises:
        ValueError: names flag and value.
    """
    if isinstance(value, int | float):
        check_number(name, value, least, most)
    if value in ([], [[]]):  # argparse's "--" before Python 3.13
        raise ValueError(f"--{name} --: must have a value")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str | os.PathLike):
            check_text(name, os.fspath(text))
    if name == "device" and not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", str(value)):
        raise ValueError(f"--device {value}: must be auto, cpu, mps, cuda or cuda:N")
    if name == "curriculum" and not re.fullmatch("none|length|field:.+", str(value)):
        raise ValueError(f"--curriculum {value}: must be none, length or field:NAME")
    if name == "save_weight":
        check_name(name, str(value))


def check_number(name: str, value: float, least: float, most: float) -> None:
    """ValueError: the number is none, or outside of its bounds."""
    if not math.isfinite(value):
        must = "a finite number"
    elif value < least:
        must = "positive" if value <= 0 < least else f"{least:,} or more"
    else:
        must = f"at most {most:,}"
    raise ValueError(f"--{name} {value}: must be {must}")


def check_text(name: str, text: str) -> None:
    """ValueError: no file could have this name, nor a log this line."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        data = b"\0"
    if b"\0" in data:
        raise ValueError(f"--{name} {text!r}: has a character that no text may hold")


def check_name(name: str, text: str) -> None:
    """ValueError: a file of this name would lie elsewhere than it should, or nowhere."""
    # Without the bytes of an encoding that is not UTF-8
    is_legible = re.sub("[\udc80-\udcff]", "", text).isprintable()
    if text in ("", ".", "..") or "/" in text or not is_legible:
        raise ValueError(
            f"--{name} {text!r}: must be a file's name, without a folder: --out_dir says where it"
            " lies"
        )
    size = len(os.fsencode(text))
    if size > 200:  # of 255, as other files are named after it
        raise ValueError(f"--{name} {text[:20]}...: has {size} bytes, a file's name may have 200")
