"""What is wrong where a token cache cannot be built, in words."""

from pathlib import Path


def no_usable_row(data_path: Path, counts: dict) -> ValueError:
    """Nothing is left of a file; counts: of its rows, dropped, bad and first_bad."""
    if counts["dropped"] + counts["bad"] == 0:
        return ValueError(f"{data_path}: the file is empty")
    dropped = f"{counts['dropped']} without a supervised token within max_seq_len"
    fault = f"no usable row: {counts['bad']} bad, {dropped}; see --max_seq_len."
    return ValueError(f"{data_path}: {fault} {counts['first_bad']}".rstrip())


def unwritable(error: OSError, folder: Path) -> ValueError:
    """The cache `folder` cannot be locked or written."""
    if error.filename == f"{folder}.lock":
        return ValueError(f"cannot write {error.filename}: {error.strerror}; see --cache_dir")
    fault = f"{error.filename or f'{folder}.building'}: {error.strerror or error}"
    return ValueError(f"{fault}; the token cache needs about the size of the data")
