"""--chat_template: a chat template instead of the tokenizer's own."""

from pathlib import Path


def read_template(chat_template: str | Path) -> tuple[str, str]:
    """The text of --chat_template, a file or the text itself, and where it is from."""
    if isinstance(chat_template, str) and "{" in chat_template:
        return chat_template, "the chat template"
    if Path(chat_template).exists() and not Path(chat_template).is_file():
        raise ValueError(f"--chat_template {chat_template}: not a file")  # but a pipe, a device
    try:
        text = Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"--chat_template {chat_template}: {reason}") from None
    if not text.strip():
        raise ValueError(f"--chat_template {chat_template}: the file is empty")
    return text, str(chat_template)
