"""Files that are no UTF-8 rows: each is named, and the command that is advised makes rows of it."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import write_jsonl

from dataset.prompt_dataset import PromptDataset
from dataset.read_rows import read_rows
from trainer.train_tokenizer import read_texts

ROWS = [
    {
        "instruction": "\u4e2d\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f",
        "output": "\u662f\u5317\u4eac\u3002",
    },
    {"instruction": 'Say "a, b"\nor c;\td', "output": "a | b\n"},
    {"instruction": "Hi", "output": "Hello"},
]
PLAIN = [
    {"instruction": "Hi", "output": "Hello"},
    {"instruction": "Hm?", "output": "caf\u00e9 \u2013 na\u00efve"},
]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
# Its bytes are those of Chinese; enough of it can be told from that.
KOREAN = (
    '{"instruction": "\ub300\ud55c\ubbfc\uad6d\uc758 \uc218\ub3c4\ub294 \uc11c\uc6b8\uc774\ub2e4. '
)
WESTERN = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PLAIN)


def table(delimiter: str, rows=ROWS) -> str:
    cells = [list(rows[0]), *([*row.values()] for row in rows)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


def zipped(names: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in names.items():
            archive.writestr(name, text)
    return file.getvalue()


def tarred(name: str, mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(TEXT.encode())
        archive.addfile(info, io.BytesIO(TEXT.encode()))
    return file.getvalue()


def database() -> bytes:
    base = sqlite3.connect(":memory:")
    base.execute("create table chats (instruction, output)")
    base.executemany("insert into chats values (:instruction, :output)", ROWS)
    base.commit()
    return (
        base.serialize()
        if hasattr(base, "serialize")
        else pytest.skip("Python 3.11 can serialize a database")
    )


def arrow(kind: str) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file, rows = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        parquet.write_table(rows, file)
        return file.getvalue()
    with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(
        file, rows.schema
    ) as writer:
        writer.write_table(rows)
    return file.getvalue()


def xml(tag: str) -> str:
    rows = ["".join(f"<{name}>{text}</{name}>" for name, text in row.items()) for row in ROWS]
    return f"{tag}<rows>{''.join(f'<row>{row}</row>' for row in rows)}</rows>"


def zstd() -> bytes:
    if not shutil.which("zstd"):
        pytest.skip("no zstd program")
    return subprocess.run(
        ["zstd", "-c"], input=TEXT.encode(), capture_output=True, check=True
    ).stdout


# case -> (name of the file, its bytes, what the message says, the rows that the advised command
# makes)
KINDS = {
    "gzip": ("a.jsonl.gz", gzip.compress(TEXT.encode()), "compressed with gzip: gzip -dc", ROWS),
    "gzip by content": ("a.jsonl", gzip.compress(TEXT.encode()), "compressed with gzip: gzip -dc", ROWS),
    "bzip2": ("a.json.bz2", bz2.compress(TEXT.encode()), "compressed with bzip2: bzip2 -dc", ROWS),
    "xz": ("a.jsonl.xz", lzma.compress(TEXT.encode()), "compressed with xz: xz -dc", ROWS),
    "zstd": ("a.jsonl.zst", zstd, "compressed with zstd: zstd -dc", ROWS),
    "zip": ("a.zip", zipped({"rows.jsonl": TEXT}), "a zip archive with rows.jsonl: python -m zipfile -e", ROWS),
    "tar": ("a.tar", tarred("rows.jsonl", "w"), "a tar archive: tar -xf", ROWS),
    "tar.gz": ("a.tar.gz", tarred("rows.jsonl", "w:gz"), "a compressed tar archive: tar -xf", ROWS),
    "parquet": ("a.parquet", lambda: arrow("parquet"), "parquet: python -c", ROWS),
    "arrow": ("a.arrow", lambda: arrow("file"), "an Arrow (feather) file: python -c", ROWS),
    "arrow stream": ("data-00000-of-00001.arrow", lambda: arrow("stream"), "an Arrow stream: python -c", ROWS),
    "SQLite": ("a.db", database, "an SQLite database: with the name of its table for TABLE: python -c", ROWS),
    "pickle": ("a.pkl", pickle.dumps(ROWS), "a Python pickle: if you trust", ROWS),
    "UTF-16": ("a.jsonl", TEXT.encode("utf-16"), "text in UTF-16: iconv -f UTF-16 -t UTF-8", ROWS),
    "UTF-16, big end first": ("a.jsonl", b"\xfe\xff" + TEXT.encode("utf-16-be"), "iconv -f UTF-16 -t UTF-8", ROWS),
    "UTF-16LE without mark": ("a.jsonl", TEXT.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8", ROWS),
    "UTF-16BE without mark": ("a.jsonl", TEXT.encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8", ROWS),
    "UTF-32": ("a.jsonl", TEXT.encode("utf-32"), "text in UTF-32: iconv -f UTF-32 -t UTF-8", ROWS),
    "UTF-32BE without mark": ("a.jsonl", TEXT.encode("utf-32-be"), "iconv -f UTF-32BE -t UTF-8", ROWS),
    "GB18030": ("a.jsonl", TEXT.encode("gb18030"), "a.jsonl:1: byte 0xd6 at column 18 is not UTF-8; convert the file, "
                "it is GB18030: iconv -f GB18030 -t UTF-8", ROWS),
    "GBK array": ("a.json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode("gbk"),
                  "a.json:3: byte 0xd6 at offset 23 is not UTF-8; convert the file, it is GB18030: iconv", ROWS),
    "Windows-1252": ("a.jsonl", WESTERN.encode("cp1252"), "a.jsonl:2: byte 0xe9 at column 38 is not UTF-8; convert the "
                     "file, it is WINDOWS-1252: iconv -f WINDOWS-1252 -t UTF-8", PLAIN),
    "UTF-8 and GBK": ("a.jsonl", TEXT.encode() + TEXT.encode("gbk"), "a.jsonl:4: byte 0xd6 at column 18 is not UTF-8; "
                      "some lines are UTF-8 and some GB18030; convert those: python -c", ROWS + ROWS),
    "GBK and UTF-8": ("a.jsonl", TEXT.encode("gbk") + TEXT.encode(), "a.jsonl:1: byte", ROWS + ROWS),
    "UTF-8 and Windows-1252": ("a.jsonl", WESTERN.encode() + WESTERN.encode("cp1252"), "some lines are UTF-8 and some "
                               "WINDOWS-1252; convert those: python -c", PLAIN + PLAIN),
    "CSV": ("a.csv", table(",").encode(), "a CSV table: python -c", ROWS),
    "CSV with a mark": ("a.csv", b"\xef\xbb\xbf" + table(",").encode(), "a CSV table: python -c", ROWS),
    "CSV by content": ("a.jsonl", table(",").encode(), "a CSV table: python -c", ROWS),
    "CSV in GBK": ("a.csv", table(",").encode("gbk"), "a CSV table: python -c", ROWS),
    "CSV with semicolons": ("a.csv", table(";", ROWS[:1] * 2).encode(), "a CSV table: python -c", ROWS[:1] * 2),
    "TSV": ("a.tsv", table("\t").encode(), "tab-separated values: python -c", ROWS),
    "XML": ("a.xml", xml("<?xml version='1.0' encoding='UTF-8'?>").encode(), "XML: for a row of each", ROWS),
    "XML without head": ("a.json", xml("").encode(), "XML: for a row of each", ROWS),
    "JSON lines in a .txt": ("a.txt", TEXT.encode(), "JSON, but a .txt file is read as plain text: mv", ROWS),
}  # fmt: skip
NO_COMMAND = {
    "web page": ("a.jsonl", b"\n<!DOCTYPE html>\n<html>\n{}</html>", "a web page (HTML): fetch the file itself"),
    "web page as text": ("a.txt", b"<html lang='en'>", "a web page (HTML)"),
    "LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
                    "a Git LFS pointer, not the file itself: git -C "),
    "LFS pointer as text": ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "torn zip": ("a.zip", zipped({"rows.jsonl": TEXT})[:60], "a zip archive that is not whole: fetch it again"),
    "Excel": ("a.xlsx", zipped({"[Content_Types].xml": "", "xl/workbook.xml": ""}), "an Excel workbook: python -c"),
    "Word": ("a.docx", zipped({"word/document.xml": ""}), "a Word document: save it as a .txt"),
    "weights": ("a.pth", zipped({"a/data.pkl": ""}), "a file of torch.save, not data: --from_weight takes"),
    "safetensors": ("a.jsonl", b"\x20\1\0\0\0\0\0\0{\"model\": {}}", "weights in safetensors, not data"),
    "parquet by its first bytes": ("a.jsonl", b"PAR1\x15\0\x15\0", "this is parquet: python -c"),
    "PDF": ("a.txt", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "a PDF: save its text"),
    "zero bytes": ("a.jsonl", bytes(5000), "nothing but zero bytes: a download or copy that was cut off"),
    "binary": ("a.jsonl", bytes(range(256)) * 9, "this is binary data"),
    "plain text": ("a.md", b"Once upon a time, a cat.\nIt sat, and slept.\n", "plain text, not JSON: for pretraining"),
    "Korean": ("a.jsonl", KOREAN.encode("euc-kr") * 20, "in an encoding that we do not know: iconv -f ITS_ENCODING"),
    "a byte in UTF-8": ("a.jsonl", TEXT.encode().replace(b"\xef\xbc\x9f", b"\xef\xbc"), "iconv -c -f UTF-8 -t UTF-8"),
    "cut within a character": ("a.jsonl", TEXT.encode()[:22], "the file ends within a character, so it was cut off"),
}  # fmt: skip


def written(folder: Path, name: str, content) -> Path:
    path = folder / name
    path.write_bytes(content() if callable(content) else content)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        for (line, _, fault), _ in read_rows(path):
            if fault:
                raise ValueError(f"{path}:{line}: {fault}")
    message = str(error.value)
    assert message.startswith(f"{path}:") and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("case", KINDS)
def test_the_advised_command_makes_rows_of_the_file(tmp_path, case):
    name, content, said, rows = KINDS[case]
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    path = written(folder, name, content)
    message = refused(path)
    assert said in message
    command = re.search(r"(python -[cm]|[a-z0-9]+ -(dc|f|xf)|mv) .*?(?= \(needs: |$)", message)[0]
    path_variable = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path_variable, "PYTHONIOENCODING": "gbk"}
    subprocess.run(
        ["bash", "-c", command.replace("TABLE", "chats")], check=True, cwd=folder, env=environment
    )
    (made,) = set(folder.iterdir()) - {path}
    assert [row for (_, row, _), _ in read_rows(made)] == rows


@pytest.mark.parametrize("case", NO_COMMAND)
def test_a_file_that_is_no_rows_is_named(tmp_path, case):
    name, content, said = NO_COMMAND[case]
    assert said in refused(written(tmp_path, name, content))


def test_a_command_overwrites_nothing(tmp_path):
    for name in ("a.jsonl", "new_a.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    assert refused(written(tmp_path, "a.csv", table(",").encode())).endswith("/new_new_a.jsonl")


def test_faults_are_told_apart_from_other_files(tmp_path):
    """What is wrong with single rows is still said by line, and text is text."""
    for lines in (
        ["{", *ROWS],
        ["# notes", *ROWS],
        ['"a text"', '"another"'],
        ["  {}"],
        ["a,b", *ROWS],
    ):
        assert len(list(read_rows(write_jsonl(tmp_path / "a.jsonl", lines)))) == len(lines)
    assert len(list(read_rows(write_jsonl(tmp_path / "rows.csv", ROWS)))) == len(ROWS)
    marks = ("GGUF \u662f", "PAR1 \u662f", "a,b\nc,d\n", "<doc id=1>\n\u662f</doc>\n", "{no json}")
    for text in (*marks, "a\0b" + "\u662f" * 99, "no\0json", '        {"\u662f": 1'):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert list(read_rows(tmp_path / "a.txt"))


def test_gbk_far_behind_the_beginning(tmp_path):
    """Ten thousand rows of ASCII do not hide it, nor does the block in which it lies."""
    rows = [json.dumps({"instruction": f"number {n}", "output": "x" * 300}) for n in range(10_000)]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(rows).encode() + b"\n" + TEXT.encode("gbk"))
    assert (
        "a.jsonl:10001: byte 0xd6" in (message := refused(path))
        and "it is GB18030: iconv" in message
    )
    path = tmp_path / "a.json"
    path.write_bytes(
        f"[{', '.join(rows)},".encode()
        + json.dumps(ROWS[0], ensure_ascii=False).encode("gbk")
        + b"]"
    )
    assert "a.json:1: byte 0xd6" in (message := refused(path)) and "it is GB18030: iconv" in message


def test_real_chinese_is_known_as_such(tmp_path, shared_data):
    rows = json.loads((shared_data / "alpaca_zh_demo.json").read_text("utf-8"))
    for n in range(0, 1000, 7):  # also a single row
        path = tmp_path / f"{n}.json"
        path.write_bytes(json.dumps(rows[n : n + 1], ensure_ascii=False).encode("gb18030"))
        assert "it is GB18030: iconv" in refused(path), rows[n]


def test_rows_of_another_kind_are_no_bad_rows(sft, tokenizer, tmp_path):
    """--skip_bad would leave out every one of them."""
    path = written(tmp_path, "a.jsonl", gzip.compress(TEXT.encode()))
    with pytest.raises(ValueError, match="compressed with gzip"):
        sft(path, skip_bad=True)
    with pytest.raises(ValueError, match="compressed with gzip"):
        PromptDataset(path, tokenizer, 64, 16, skip_bad=True)


def test_the_tokenizer_says_the_same(tmp_path):
    cases = {
        "a.csv.gz": (gzip.compress(b"a"), "compressed with gzip: gzip -dc"),
        "a.jsonl": (TEXT.encode("utf-16"), "text in UTF-16: iconv -f UTF-16"),
        "a.json": (b"<html></html>", "a web page"),
        "a.md": ("fine\n\u4e2d\u56fd\u7684\u9996\u90fd\n".encode("gbk"), "a.md:2: byte 0xd6 is not UTF-8; "
                 "convert the file, it is GB18030: iconv -f GB18030 -t UTF-8"),
    }  # fmt: skip
    for name, (content, said) in cases.items():
        with pytest.raises(ValueError) as error:
            list(read_texts(written(tmp_path, name, content)))
        assert said in str(error.value)
    for name in ("page.html", "table.csv", "notes.md"):  # any text is text here
        path = written(tmp_path, name, b"<html>\r\n  a, b\r\nc, d</html>")
        assert list(read_texts(path)) == ["<html>\n  a, b\n", "c, d</html>"]
