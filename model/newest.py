"""Weights by the name of a run or a stage."""

from pathlib import Path

from model.weights import is_path


def newest_weights(weight: str, out_dir: str | Path, flag: str = "--weight") -> Path:
    """The weights that a name means where the model's shape is not known: chat, scoring, serving.

    Args:
        weight: a path, a hub name, a run (`full_sft_512`), or a stage (`full_sft`): its newest run.
        flag: what named them, for the error.

    Raises:
        ValueError: there are none; says what to run.
    """
    path = Path(weight) if is_path(weight) else Path(out_dir) / f"{weight}.pth"
    if path.is_file() or is_path(weight) and path.is_dir():
        return path
    if is_path(weight) and weight.endswith(".pth"):
        raise ValueError(f"{flag} {weight}: no such file")
    if is_path(weight):
        from model.hf import resolve_folder

        return resolve_folder(weight, flag)
    runs = [other for other in Path(out_dir).glob("*.pth") if other.name.startswith(f"{weight}_")]
    if not runs:
        script = f"trainer/train_{weight}.py"
        is_stage = (Path(__file__).parents[1] / script).is_file()
        first = f"run `python {script}` first" if is_stage else "train it first"
        raise ValueError(f"no {weight} weights in {out_dir}: {first}, or name others with {flag}")
    return max(runs, key=lambda other: other.stat().st_mtime)
