"""What a data file is, told by its bytes, and what to do where it cannot be read as it is.

People hand in what they have: compressed files, parquet, spreadsheets, web pages, text in another
encoding. Each is named in one line with the command that makes rows of this very file. Nothing here
reads data for training.
"""

import codecs
import csv
import io
import json
import re
import shlex
import zipfile
from pathlib import Path

HEAD = 1 << 16  # bytes that a kind is told by
SAMPLE = 1 << 20  # bytes that an encoding is told by


def to_rows(rows: str, modules: str, before: str = "") -> str:
    """The command that writes the Python expression `rows` for the file as JSON lines."""
    code = (
        f"import json,sys,{modules}; {before}[print(json.dumps(row,default=str)) for row in {rows}]"
    )
    return f'python -c "{code}" FILE > ROWS'


WITH_PYARROW = " (needs: pip install pyarrow)"
PARQUET = (
    "(row for some in pyarrow.parquet.ParquetFile(sys.argv[1]).iter_batches() for row in"
    " some.to_pylist())"
)
ARROW = "pyarrow.ipc.open_{}(open(sys.argv[1],'rb')).read_all().to_pylist()"
SQLITE = "base=sqlite3.connect(sys.argv[1]); base.row_factory=sqlite3.Row; "
XML = (
    "({field.tag: field.text for field in row} for row in"
    " xml.etree.ElementTree.parse(sys.argv[1]).getroot())"
)
EXCEL = "pandas.read_excel(sys.argv[1]).to_json(sys.argv[2],orient='records',lines=True)"
NO_ROWS = "there are no rows of text in it"

# First bytes, what they begin, what to do. In a command FILE and FOLDER are what is there, and
# UNPACKED, ROWS, TEXT and UTF8 what it writes.
BINARY = (
    (rb"\x1f\x8b", "compressed with gzip", "gzip -dc FILE > UNPACKED"),
    (rb"BZh\d1AY&SY", "compressed with bzip2", "bzip2 -dc FILE > UNPACKED"),
    (rb"\xfd7zXZ\0", "compressed with xz", "xz -dc FILE > UNPACKED"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -dc FILE > UNPACKED"),
    (rb"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -dc FILE > UNPACKED"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x FILE"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unrar x FILE"),
    (rb"(?s).{257}ustar", "a tar archive", "tar -xf FILE"),
    (rb"PAR1", "parquet", to_rows(PARQUET, "pyarrow.parquet") + WITH_PYARROW),
    (
        rb"ARROW1",
        "an Arrow (feather) file",
        to_rows(ARROW.format("file"), "pyarrow.ipc") + WITH_PYARROW,
    ),
    (
        rb"\xff\xff\xff\xff",
        "an Arrow stream",
        to_rows(ARROW.format("stream"), "pyarrow.ipc") + WITH_PYARROW,
    ),
    (rb"FEA1", "a feather file of version 1", "write it again as JSON lines"),
    (
        rb"SQLite format 3\0",
        "an SQLite database",
        "with the name of its table for TABLE: "
        + to_rows("map(dict,base.execute('select * from TABLE'))", "sqlite3", SQLITE),
    ),
    (
        rb"\x80[\x02-\x05]",
        "a Python pickle",
        "if you trust whoever made it, for it can run any code: "
        + to_rows("pickle.load(open(sys.argv[1],'rb'))", "pickle"),
    ),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", NO_ROWS),
    (rb"\x93NUMPY", "a numpy array", NO_ROWS),
    (rb"GGUF", "a model in GGUF, not data", NO_ROWS),
    (rb"(?s).{5}\0\0\0\{\"", "weights in safetensors, not data", "--from_weight takes weights"),
    (rb"%PDF-", "a PDF", "save its text as a .txt file in UTF-8"),
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an old Word or Excel file",
        "save it as text or CSV in UTF-8",
    ),
)

# Frequent where text is Chinese, and in Western punctuation.
CHINESE = "\u7684\u4e00\u662f\u4e0d\u4e86\u5728\u4eba\u6709\u6211\uff0c\u3002\u3001"
WESTERN = "\u2018\u2019\u201c\u201d\u201e\u2013\u2014\u2026\u20ac\xa0\xa1\xa3\xa9\xab\xb0\xbb\xbf"


def check_kind(path: Path, expected: str) -> None:
    """Refuse a file that is something else than what its reader takes.

    Args:
        expected: 'rows' of JSON, 'lines' of text (a document each), or any 'text'.

    Raises:
        ValueError: what the file is and how to convert it, in one line that begins with its path.
    """
    if path.exists() and not path.is_file():  # to open a pipe would wait for whoever writes to it
        raise ValueError(f"{path}: not a file")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    text = head.removeprefix(codecs.BOM_UTF8)
    if mismatch := binary_kind(path, head) or text_kind(path, text, expected):
        kind, advice = mismatch
        raise ValueError(f"{path}: this is {kind}: {command(advice, path)}")


def command(advice: str, path: Path) -> str:
    """The advice about a file, with quoted paths; none that it writes to exists already."""
    is_packed = path.suffix in (".gz", ".bz2", ".xz", ".zst", ".lz4")
    names = {
        "UNPACKED": path.stem if is_packed else f"unpacked_{path.name}",
        "ROWS": f"{path.stem}.jsonl",
        "TEXT": f"{path.stem}.txt",
        "UTF8": f"{path.stem}.utf8{path.suffix}",
    }
    paths = {"FILE": path, "FOLDER": path.parent}
    for place, name in names.items():
        paths[place] = path.with_name(name)
        while paths[place].exists():
            paths[place] = path.with_name(f"new_{paths[place].name}")
    words = rf"\b({'|'.join(paths)})\b"
    return re.sub(words, lambda match: shlex.quote(str(paths[match[0]])), advice)


# --------------------------------------------------------------------------------------------------
# Kinds
# --------------------------------------------------------------------------------------------------


def binary_kind(path: Path, head: bytes) -> tuple[str, str] | None:
    """(what it is, what to do), or None where it can be text of one byte a character or more."""
    for name, boms in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if head.startswith(boms):
            return f"text in {name}", f"iconv -f {name} -t UTF-8 FILE > UTF8"
    if not re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head) and decodes(head, "utf-8"):
        return None
    if head.startswith(b"PK\x03\x04"):
        return zip_kind(path)
    for first, kind, advice in BINARY:
        if re.match(first, head):
            tar = kind.startswith("compressed") and re.search(r"\.tar\.|\.t[gbx]z2?$", path.name)
            return ("a compressed tar archive", "tar -xf FILE") if tar else (kind, advice)
    # Of UTF-16 that is UTF-8 too, nearly every other byte is 0.
    if b"\0" not in head or (head.count(0) <= len(head) // 4 and decodes(head, "utf-8")):
        return None
    if name := wide_encoding(head):
        return f"text in {name}", f"iconv -f {name} -t UTF-8 FILE > UTF8"
    if not head.strip(b"\0"):
        return "nothing but zero bytes", "a download or copy that was cut off; fetch it again"
    return "binary data", NO_ROWS


def zip_kind(path: Path) -> tuple[str, str]:
    """As `binary_kind`, of what is packed as a zip archive."""
    try:
        names = zipfile.ZipFile(path).namelist()
    except (OSError, zipfile.BadZipFile):
        return "a zip archive that is not whole", "fetch it again"
    if any(name.endswith("data.pkl") for name in names):
        return "a file of torch.save, not data", "--from_weight takes weights"
    if "xl/workbook.xml" in names:
        advice = (
            f'python -c "import pandas,sys; {EXCEL}" FILE ROWS (needs: pip install pandas openpyxl)'
        )
        return "an Excel workbook", advice
    if "word/document.xml" in names:
        return "a Word document", "save it as a .txt file in UTF-8"
    return (
        f"a zip archive with {', '.join(names[:3])}{', ...' * (len(names) > 3)}",
        "python -m zipfile -e FILE FOLDER",
    )


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a byte order mark: the one that gives text with most ASCII in it."""
    counts = {}
    for name, width in (("UTF-32LE", 4), ("UTF-32BE", 4), ("UTF-16LE", 2), ("UTF-16BE", 2)):
        if decodes(head, name):
            text = head.decode(name, "ignore")
            if not re.search("[\0-\x08\x0e-\x1f]", text):
                counts[name] = width * sum(char < "\x7f" for char in text)
    return max(counts, key=counts.get) if any(counts.values()) else None


def text_kind(path: Path, head: bytes, expected: str) -> tuple[str, str] | None:
    """(what it is, what to do) of a text that is not what is expected, or None."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself", "git -C FOLDER lfs pull"
    if expected == "text":
        return None
    if re.match(rb"(?i)\s*<(!doctype html|html|head|body)\b", head):
        return (
            "a web page (HTML)",
            "fetch the file itself (GitHub: Raw, Hugging Face: resolve in place of blob)",
        )
    complete = head.split(b"\n")[: -1 if len(head) > HEAD - 4 else None]
    lines = [line for line in complete if line.strip()]
    if expected == "lines":
        rows = lines and all(is_json(line, b"{") for line in lines[:3])
        if rows or re.match(rb'\s*\[\s*\{\s*"', head):
            return "JSON, but a .txt file is read as plain text", "mv FILE ROWS"
        return None
    table = path.suffix in (".csv", ".tsv") and not any(is_json(line, b"{") for line in lines[:1])
    if not table and any(
        re.match(rb"\s*[\[{]", line) or is_json(line, b'"') for line in lines[:20]
    ):
        return None  # has rows: what is wrong with others of them is said by line
    encoding = "utf-8-sig" if decodes(head, "utf-8") else guess_encoding(head)
    text = head.decode(encoding or "latin-1", "ignore")
    if re.match(r"\s*<[?!a-zA-Z]", text):
        return (
            "XML",
            f"for a row of each element below the root: {to_rows(XML, 'xml.etree.ElementTree')}",
        )
    delimiter = csv_delimiter(text) or (table and {".csv": ",", ".tsv": "\t"}[path.suffix])
    if delimiter and lines:
        kind = "tab-separated values" if delimiter == "\t" else "a CSV table"
        option = "" if delimiter == "," else f",delimiter={delimiter!r}"
        opened = f"open(sys.argv[1],encoding='{encoding or 'ITS_ENCODING'}',newline='')"
        rows = f"csv.DictReader({opened}{option})"
        return kind, to_rows(rows, "csv", "csv.field_size_limit(10**9); ")
    if lines and encoding == "utf-8-sig":
        return "plain text, not JSON", "for pretraining on a document a line: mv FILE TEXT"
    return None


def is_json(line: bytes, first: bytes) -> bool:
    """Whether a line is a JSON value that begins so."""
    if not line.lstrip().startswith(first):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def csv_delimiter(text: str) -> str | None:
    """What separates the columns, if every row has as many as the header, and more than one."""
    for delimiter in "\t,;|":
        try:
            rows = [
                row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row
            ]
        except csv.Error:
            continue
        if len(text) > HEAD // 4:
            rows = rows[:-1]  # perhaps cut off
        names = rows[0] if rows else []
        named = len(names) > 1 and all(re.fullmatch(r"[^.!?\n]{1,40}", name) for name in names)
        if named and len(rows) > 1 and all(len(row) == len(names) for row in rows):
            return delimiter
    return None


# --------------------------------------------------------------------------------------------------
# Encodings
# --------------------------------------------------------------------------------------------------


def decodes(content: bytes, encoding: str) -> bool:
    """Whether it is text in an encoding; its last character may be cut off."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return False
    return True


def guess_encoding(content: bytes) -> str | None:
    """GB18030 or WINDOWS-1252, where the text reads as Chinese or Western in it; or None."""
    if decodes(content, "gb18030"):
        chars = [char for char in content.decode("gb18030", "ignore") if char > "\x7f"]
        # GB2312 has punctuation in its rows 1 to 3 and the frequent characters in rows 16 to 55.
        rows = [char.encode("gb2312", "ignore")[:1] for char in chars]
        frequent = sum(b"\xa1" <= row <= b"\xa3" or b"\xb0" <= row <= b"\xd7" for row in rows)
        # Korean lies in the same rows, but has few of these.
        usual = sum(char in CHINESE for char in chars)
        is_chinese = len(chars) < 100 or usual >= 0.02 * len(chars)
        if chars and frequent >= 0.7 * len(chars) and is_chinese:
            return "GB18030"
    if decodes(content, "cp1252"):
        text = content.decode("cp1252")
        chars = [char for char in text if char > "\x7f"]
        likely = sum(char.isalpha() or char in WESTERN for char in chars)
        pairs = len(re.findall("[\x80-\uffff](?=[\x80-\uffff])", text))
        if chars and likely >= 0.9 * len(chars) and pairs <= 0.3 * len(chars):
            return "WINDOWS-1252"
    return None


def not_utf8(path: Path, offset: int) -> str:
    """What to do about bytes that are not UTF-8, the first at `offset` of a file or soon behind."""
    highest, sample, to_end = around(path, offset)
    has_wide = highest >= 0x80 or not sample.decode("utf-8", "ignore").isascii()
    if to_end and has_wide and decodes(sample, "utf-8"):
        return "the file ends within a character, so it was cut off; fetch it again"
    first, *lines = sample.split(b"\n")
    shown = first.decode("utf-8", "replace")
    if sum(char > "\x7f" for char in shown) > 4 * shown.count("\ufffd"):
        without = "iconv -c -f UTF-8 -t UTF-8 FILE > UTF8"
        return command(f"some of the text is damaged; without it: {without}", path)
    bad = [first]
    for line in lines if to_end else lines[:-1]:
        if decodes(line, "utf-8"):
            highest = max([highest, *line])
        else:
            bad.append(line)
    encoding = guess_encoding(b"\n".join(bad))
    if not encoding:
        convert = "iconv -f ITS_ENCODING -t UTF-8 FILE > UTF8"
        advice = f"convert the file, in an encoding that we do not know: {convert}"
        return command(advice, path)
    # Two bytes of GB18030 can be a character of UTF-8 by chance, three cannot.
    if highest < (0xE0 if encoding == "GB18030" else 0x80):
        convert = f"iconv -f {encoding} -t UTF-8 FILE > UTF8"
        return command(f"convert the file, it is {encoding}: {convert}", path)
    is_utf8 = "line.decode('utf-8','ignore').encode()==line"
    each = f"line.decode('utf-8' if {is_utf8} else '{encoding}').encode()"
    code = f"import sys; [sys.stdout.buffer.write({each}) for line in open(sys.argv[1],'rb')]"
    convert = f'python -c "{code}" FILE > UTF8'
    return command(f"some lines are UTF-8 and some {encoding}; convert those: {convert}", path)


def around(path: Path, offset: int) -> tuple[int, bytes, bool]:
    """The highest byte before `offset`, the bytes from there on, and whether these are all.

    They begin with a character: where the offset lies within one, a little before it.
    """
    with open(path, "rb") as file:
        file.seek(max(0, offset - HEAD))
        before = file.read(min(offset, HEAD))
        # A byte below "0" is no part of a longer character in any of these encodings.
        ends = (n for n, byte in enumerate(before, 1) if byte < 0x30)
        begin = offset - len(before) + max(ends, default=0)
        file.seek(begin)
        sample, to_end = file.read(SAMPLE), not file.read(1)
        file.seek(0)
        highest = 0
        while highest < 0xE0 and (block := file.read(min(SAMPLE, begin - file.tell()))):
            highest = max(highest, max(block.removeprefix(codecs.BOM_UTF8), default=0))
    return highest, sample, to_end
