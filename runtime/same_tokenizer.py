"""Two models side by side must have been trained with the same tokenizer."""

from pathlib import Path

from runtime.recorded_tokenizer import find_record


def check_same(weights: Path, recorded: dict | None, record: dict) -> None:
    """ValueError: these weights were trained with another tokenizer than a run has.

    Args:
        recorded: `LMConfig.tokenizer` of the weights.
        record: that of the run.
    """
    own = find_record(weights, recorded)
    if own and own["sha256"] != record["sha256"]:
        fault = (
            f"trained with the tokenizer of {own['folder']}, not with that of {record['folder']}"
        )
        raise ValueError(f"{weights}: {fault}: both models must have the same tokenizer")
