"""What is wrong where a token cache cannot be built, in words."""

from pathlib import Path


def no_usable_row(data_path: Path, stats: dict) -> ValueError:
    """Nothing is left of a file; stats: of its rows, as in `token_cache.TokenCache`."""
    if stats["dropped"] + stats["bad"] == 0:
        return ValueError(f"{data_path}: the file is empty")
    dropped = f"{stats['dropped']} without a supervised token within max_seq_len"
    fault = f"no usable row: {stats['bad']} bad, {dropped}; see --max_seq_len."
    return ValueError(f"{data_path}: {fault} {stats['first_bad']}".rstrip())


def unwritable(error: OSError, folder: Path) -> ValueError:
    """A cache cannot be written to its folder."""
    fault = f"{error.filename or folder}: {error.strerror or error}"
    return ValueError(f"{fault}; the token cache needs about the size of the data")
