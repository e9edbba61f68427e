"""Text as people's editors and spreadsheets have saved it, text for captions, and text for a terminal."""

import codecs
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path, guessed: list[str] | None = None) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as Windows saves it. Lines end in "\\n".

    guessed: if given, text that is neither is read as Windows-1252, in which older programs save "é", and described
    here. Otherwise it raises ValueError, which names the file and the byte.
    """
    if not path.is_file():  # a pipe, say, whose reader would wait for ever
        raise ValueError(f"{path} is not a file")
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
        wrong = text.find("\0")  # UTF-16 without its mark is valid UTF-8, but no text
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        problem = f"{path} is not text in UTF-8 (byte {wrong} is 0x{data[wrong]:02x})"
        if guessed is None or encoding == "utf-16" or b"\0" in data:
            raise ValueError(f"{problem}: save it as UTF-8")
        text = data.decode("cp1252")
        guessed.append(problem)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: Path) -> Iterator[tuple[int, str | dict]]:
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


def with_article(name: str) -> str:
    """A name as it stands in a sentence: "a fox", "an orange", "grapes"."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name  # a plural
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def printable(text: object) -> str:
    """The text without control characters, which would command a terminal: they are spelt out, such as \\x1b."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", str(text))
