"""What a reply says, without its thinking."""

THINK, END_THINK = "<think>", "</think>"


def final_answer(text: str) -> str:
    """What a reply, or a reference answer, says behind its thinking, stripped."""
    return text.rpartition(END_THINK)[2].strip()
