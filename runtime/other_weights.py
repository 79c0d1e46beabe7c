"""What --from_weight means where no file of weights is there."""

from pathlib import Path

from model.weights import is_path


def find_other(name: str, path: Path, required: bool) -> Path:
    """A folder in Hugging Face's format, here or on the hub.

    Args:
        name: as it was given.
        path: as it was understood, where no file is.

    Raises:
        ValueError: there are no such weights, and they are required.
    """
    if is_path(name) and not name.endswith(".pth") and not path.exists():
        from model.hf import resolve_folder

        try:
            return resolve_folder(name, "--from_weight")
        except ValueError:
            if required:
                raise
    if not path.exists() and Path(name).is_dir():
        return Path(name)
    if required and not path.exists():
        advice = "train that stage first, or see --from_weight"
        others = [] if is_path(name) else sorted(path.parent.glob(f"{name}_[0-9]*.pth"))
        if others:
            advice = f"there is {others[0]}: name it as a path, or its width with --dim"
        raise ValueError(f"{path}: no such weights file; {advice}")
    return path
