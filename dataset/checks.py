"""What every row has to be, and the values in its fields."""

MAX_ROW_BYTES = 8 << 20  # a longer row is a mistake; encoding it would cost gigabytes of memory


def present(fields: dict) -> dict:
    """The fields that are there: one with null is not."""
    return {name: value for name, value in fields.items() if value is not None}


def check_text(value: object, where: str) -> str:
    """The value, if it is a string that UTF-8 can hold: JSON can spell half a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, found {json_type(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = f"\\u{ord(value[error.start]):04x}"
            fault = f"has a lone surrogate {bad} at character {error.start}"
            raise ValueError(f"{where} {fault}") from None
    return value


def json_type(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def lone_surrogate(row: object, text: str) -> str:
    """What is wrong with what JSON made of `text`, if that spells half a character; else ""."""
    if "\\ud" not in text and "\\uD" not in text:
        return ""
    from dataset.row_faults import find_surrogate

    return find_surrogate(row)
