"""Text as people's editors and spreadsheets have saved it, and text for a terminal."""

import codecs
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as Windows saves it. Lines end in "\\n".

    Raises ValueError, which names the file and the byte, if it is anything else.
    """
    if not path.is_file():  # a pipe, say, whose reader would wait for ever
        raise ValueError(f"{path} is not a file")
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        if b"\0" in data and encoding == "utf-8-sig":  # valid UTF-8, but no text: UTF-16 without its mark, or no text
            raise UnicodeDecodeError(encoding, data, data.index(0), data.index(0) + 1, "")
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise ValueError(f"{path} is not text in UTF-8 ({at}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_table(path: Path) -> Iterator[tuple[int, str | dict]]:
    """The number of each line of a .jsonl file and the JSON in it; or those of a .csv file, and the row as a dict."""
    text = read_text(path)
    if path.suffix == ".jsonl":
        # Lines are split at "\n" only, because JSON allows U+2028 and other ends of lines inside of a text.
        yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return
    heads = text.partition("\n")[0]
    # Spreadsheets write ";" or tabs where people write numbers with a comma.
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=heads.count), skipinitialspace=True)
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} cannot be read ({error})") from None


def printable(text: object) -> str:
    """The text without control characters, which would command a terminal: they are spelt out, such as \\x1b."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", str(text))
