"""What to say where a tokenizer is not the one that weights were trained with."""

from pathlib import Path


def refuse_other(place: Path, own: Path, weights: Path | None, is_given: bool) -> None:
    """Say what is wrong with the tokenizer in a folder, which is not the recorded one.

    Args:
        own: the folder that is recorded.
        is_given: whether --tokenizer_dir names `place`; that nothing lies there is told by whoever
            loads it.

    Raises:
        ValueError: another one is there, or none where it is recorded.
    """
    if not (place / "tokenizer.json").is_file():
        if is_given:
            return
        moved = f"its tokenizer is not at {own} any more"
        raise ValueError(f"{weights}: {moved}: say with --tokenizer_dir where it lies now")
    if place.resolve() == own.resolve():
        fault = f"the tokenizer at {own} was changed since, or is another one"
    else:
        fault = f"trained with the tokenizer of {own}, not with that of {place}"
    remedy = "name an unchanged copy" if place == own else "leave the flag out, or name a copy"
    raise ValueError(f"--tokenizer_dir {place}: {weights}: {fault}; {remedy}")
