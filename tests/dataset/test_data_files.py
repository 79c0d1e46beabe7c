"""Data files: JSON lines, arrays and text in every shape, and every fault of a row."""

import json

import pytest
from conftest import chat, write_jsonl

from dataset import checks, read_array, read_rows
from dataset.cached_dataset import describe


def layouts(rows: list[dict]) -> dict[str, bytes]:
    """The same rows as files of many shapes."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    array, pretty = (
        json.dumps(rows, ensure_ascii=False),
        json.dumps(rows, ensure_ascii=False, indent=2),
    )
    texts = {
        "jsonl": "\n".join(lines) + "\n",
        "no newline at the end": "\n".join(lines),
        "blank lines": "\n\n" + "\n \t\n\n".join(lines) + "\n\n\n",
        "crlf": "\r\n".join(lines) + "\r\n",
        "indented": "\n".join("  " + line + " " for line in lines),
        "array": array,
        "array with newline": "\n" + array + "\n",
        "pretty": pretty,
        "pretty crlf": pretty.replace("\n", "\r\n"),
        "array of lines": "[\n" + ",\n".join(lines) + "\n]\n",
        "escaped": json.dumps(rows),
    }
    files = {name: text.encode() for name, text in texts.items()}
    files |= {
        f"{name} with BOM": b"\xef\xbb\xbf" + files[name]
        for name in ("jsonl", "crlf", "array", "pretty")
    }
    return files


@pytest.mark.parametrize("block", [*range(1, 12), 64, 1000])
def test_array_split_anywhere_between_blocks(tmp_path, monkeypatch, block):
    rows = [
        {
            "a": '\u00e9\u4f60\U0001f642 ] } [ { , " \\ \n',
            "b": [1, [2.5, {}], None, True],
            "\u540d": {"c": []},
        },
        {},
        {"d": "\U0001f642" * 30},
        {"e": -1.25e-3},
    ]
    monkeypatch.setattr(read_array, "BLOCK", block)
    path = tmp_path / "data.json"
    for name, content in layouts(rows).items():
        path.write_bytes(content)
        assert [row for (_, row, fault), _ in read_rows.read_rows(path) if not fault] == rows, name


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_array_rows_know_their_lines(tmp_path, monkeypatch, block):
    monkeypatch.setattr(read_array, "BLOCK", block)
    path = tmp_path / "data.json"
    path.write_text('[\n{"a": 1},\n\n{"b":\n\n2}, {"c": 3}\n,{"d": 4}]')
    assert [line for (line, _, _), _ in read_rows.read_rows(path)] == [2, 4, 6, 7]


def test_array_of_scalars_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(read_array, "BLOCK", 1)  # 12 must not become 1 and 2
    path = tmp_path / "data.json"
    path.write_text('[12, -3, "x", null, true, 10]')
    assert [row for (_, row, _), _ in read_rows.read_rows(path)] == [12, -3, "x", None, True, 10]


BROKEN_ARRAYS = {
    b'[{"a": 1},\n{"a": 2}': "2: broken JSON: the array does not end with ]",
    b'[{"a": 1},\n': "2: broken JSON: the array does not end with ]",
    b'[{"a": 1},\n{"a": }]': "2: broken JSON: Expecting value",
    b'[{"a": 1},\n{"a": "2}]': "2: broken JSON: Unterminated string",
    b'[\n{"a":\n\n1 2}]': "4: broken JSON: Expecting ',' delimiter",
    b'[{"a": 1}]\n{"a": 2}': "1: broken JSON: text behind the end of the array",
    b'[{"a": 1}\n]' + b"\n" * 5000 + b"x": "2: broken JSON: text behind the end of the array",
    b'[{"a": 1},\n\n{"a": "caf\xe9"}]': "3: byte 0xe9 at offset 22 is not UTF-8",
    b'[{"a": 1},\n{"a": "\xe4\xbd': "2: byte 0xe4 at offset 18 is not UTF-8",
    b'[{"a": 1},\n' + b"1" * 5000 + b"]": "2: broken JSON: Exceeds the limit",
}


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("content", BROKEN_ARRAYS, ids=list(BROKEN_ARRAYS.values()))
def test_broken_array_names_the_line(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(read_array, "BLOCK", block)
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_rows.read_rows(path))
    assert str(error.value).startswith(f"{path}:{BROKEN_ARRAYS[content]}")


def test_an_array_element_beyond_the_limit(sft, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MAX_ROW_BYTES", 2000)
    monkeypatch.setattr(read_array, "BLOCK", 100)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([chat("a", "b"), chat("a", "b" * 3000)], indent=1))
    with pytest.raises(ValueError, match=rf"{path}:14: row of more than"):
        sft(path)


# --------------------------------------------------------------------------------------------------
# Bad rows
# --------------------------------------------------------------------------------------------------

GOOD = json.dumps(chat("a", "b"))
BAD_ROWS = {
    "broken JSON": (b'{"conversations": [', "broken JSON: Expecting value at column 20"),
    "two rows on a line": (GOOD.encode() * 2, "broken JSON: Extra data"),
    "not an object": (b"17", "a row must be a JSON object, found a number"),
    "wrong schema": (b'{"question": "a", "answer": "b"}', "keys found: 'question', 'answer'"),
    "empty conversation": (b'{"conversations": []}', "empty conversation"),
    "unknown role": (GOOD.replace("user", "robot").encode(), "turn 1: unknown role 'robot'"),
    "null content": (
        GOOD.replace('"b"', "null").encode(),
        "turn 2: 'content' must be a string, found null",
    ),
    "no assistant turn": (GOOD.replace("assistant", "user").encode(), "no assistant turn"),
    "Latin-1": (GOOD.replace("b", "caf\u00e9").encode("latin-1"), "byte 0xe9 at column"),
    "UTF-16": (b"\xff\xfe{", "byte 0xff at column 1"),
    "lone surrogate": (GOOD.replace('"b"', '"\\ud800"').encode(), "lone surrogate"),
    "deep nesting": (b"[" * 100_000, "recursion"),
    "endless number": (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    "20 MB": (
        b'{"conversations": "' + b"x" * 20_000_000 + b'"}',
        "row of more than 19 MB, the limit is 8 MB",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_names_file_line_and_reason(sft, tmp_path, name):
    raw, reason = BAD_ROWS[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + raw + b"\n" + GOOD.encode() + b"\n" + raw + b"\n")
    with pytest.raises(ValueError) as error:
        sft(path)
    assert str(error.value).startswith(f"{path}:3: ") and reason in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()], (
        "half a cache stays"
    )

    dataset = sft(path, skip_bad=True)
    assert len(dataset) == 2 and dataset.stats["bad"] == 2
    assert (
        dataset.stats["first_bad"].startswith("line 3: ") and reason in dataset.stats["first_bad"]
    )
    assert "2 bad rows skipped (first: line 3: " in describe(dataset)


def test_the_first_of_several_faults_is_named(sft, tmp_path):
    """Reading, checking and encoding find different faults: the first in the file is told."""
    wrong_role, broken = GOOD.replace("user", "robot"), "{"
    for lines, where in (
        ([GOOD, wrong_role, broken], ":2: turn 1"),
        ([GOOD, broken, wrong_role], ":2: broken"),
    ):
        with pytest.raises(ValueError, match=where):
            sft(write_jsonl(tmp_path / "bad.jsonl", lines))


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"content": "x"}', 'needs a string under "text"; keys found: content'),
        ('{"text": null}', 'needs a string under "text"'),
        ('{"text": ["a"]}', 'needs a string under "text"'),
        ("[1]", 'must be an object {"text": ...}, found list'),
        ('{"text": "\\udc00"}', "lone surrogate"),
        ('{"text": "a', "broken JSON"),
    ],
)
def test_bad_pretraining_row(pretrain, row, reason):
    with pytest.raises(ValueError) as error:
        pretrain(['{"text": "good"}', row])
    assert "data.jsonl:2: " in str(error.value) and reason in str(error.value)
    assert pretrain(['{"text": "good"}', row], skip_bad=True).stats["bad"] == 1


def test_fields_of_pretraining_rows(pretrain):
    last = {"text": "c", "train": True, "loss": None, "label": True}
    dataset = pretrain([{"text": "a"}, {"text": "b", "weight": 0}, last])
    assert (len(dataset), dataset.stats["dropped"]) == (2, 1)
    for more, reason in (
        ({"weight": 2}, "'weight' must be 0 or 1"),
        ({"images": ["x"]}, "'images' is not supported"),
    ):
        with pytest.raises(ValueError, match=f"data.jsonl:2: {reason}"):
            pretrain([{"text": "good"}, {"text": "a"} | more])


def test_rows_that_say_not_to_learn_from_them_are_dropped(sft):
    masked = chat("a", "b")
    masked["conversations"][1]["weight"] = 0
    dataset = sft([chat("a", "b"), masked, chat("c", "d") | {"weight": 0}])
    assert (len(dataset), dataset.stats["dropped"]) == (1, 2)


def test_latin_1_text_file(pretrain, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes("fine\nna\u00efve\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"data\.txt:2: byte 0xef at column 3 is not UTF-8; convert the file"
    ):
        pretrain(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"[]", b"[ \n ]"])
def test_empty_file(sft, tmp_path, content):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: the file is empty$"):
        sft(path)


def test_file_without_a_usable_row(sft, tmp_path):
    with pytest.raises(
        ValueError, match=r"no usable row: 0 bad, 1 without a supervised token.*--max_seq_len"
    ):
        sft([chat("very " * 100, "b")], max_length=16)
    with pytest.raises(ValueError, match=r"no usable row: 2 bad, 0 without.* line 1: broken JSON"):
        sft(["{", "{"], skip_bad=True)


def test_missing_file_and_folder(sft, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such data file"):
        sft(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="not a file"):
        sft(tmp_path)
