"""Damaged pictures, captions and metadata: each is read, or refused in one sentence. None starts a program or hangs.

Every mutation is a function of a seed, so a failure names what to repeat: `python tests/test_fuzz_pictures.py 10000`
tries that many of each kind, and counts how they ended.
"""

import io
import json
import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisd.data import CaptionedPictures
from minisd.pictures import open_picture, read_mask

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}
TEXTS = ("metadata.jsonl", "metadata.csv", "a.txt", "templates.txt")
STARTED = []  # the programs that were started, which should be none
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile")
sys.addaudithook(lambda event, arguments: STARTED.append((event, arguments)) if event in PROGRAMS else None)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four small damages: bits that flip, bytes that are lost, repeated, swapped for extremes, or cut off."""
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.choice((1, 2, 4, 16, 64))
        head, part, tail = data[:at], data[at : at + length], data[at + length :]
        kind = chance.choice(("flip", "lose", "repeat", "extreme", "noise", "cut", "move"))
        if kind == "flip":
            part = bytes(byte ^ (1 << chance.randrange(8)) for byte in part)
        elif kind == "lose":
            part = b""
        elif kind == "repeat":
            part *= chance.randint(2, 40)
        elif kind == "extreme":
            part = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"%", b"{", b'"', b"\n")) * length
        elif kind == "noise":
            part = chance.randbytes(length)
        elif kind == "cut":
            tail = b""
        elif kind == "move":
            head, part, tail = head, tail, part
        data = head + part + tail
    return data


def picture_file(kind: str, chance: random.Random) -> bytes:
    """A small picture of a random mode, with what a camera or an editor writes beside the pixels."""
    modes = {"JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "L", "P", "1")}
    mode = chance.choice(modes.get(kind, ("RGB", "RGBA", "L", "LA", "P", "1", "I;16") if kind != "GIF" else ("P", "L")))
    noise = np.frombuffer(chance.randbytes(12 * 16 * 4), np.uint8).reshape(12, 16, 4)
    if mode == "I;16":
        image = Image.fromarray(noise.view("<u2")[..., 0])
    else:
        image = Image.fromarray(noise, "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = chance.randint(1, 8)
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    if kind in ("GIF", "WEBP", "TIFF", "PNG") and chance.random() < 0.3:
        options |= {"save_all": True, "append_images": [image.rotate(180)]}
    if kind == "TIFF":
        options["compression"] = chance.choice(("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ends(read, *kinds: type[Exception]) -> str:
    """ "read", or "refused" with one of these errors and one sentence. Any other error is the caller's to see."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except kinds as error:
            assert str(error) and "\n" not in str(error), repr(error)
            return "refused"
    return "read"


def picture_ends(kind: str, seed: int, folder: Path) -> str:
    chance = random.Random(f"{kind} {seed}")
    path = folder / f"{seed}.{FORMATS[kind]}"
    path.write_bytes(mutated(picture_file(kind, chance), chance))
    how = ends(lambda: open_picture(path), OSError)
    assert ends(lambda: open_picture(path.read_bytes()), OSError) == how
    ends(lambda: read_mask(path, 8, 8), OSError, ValueError)
    path.unlink()
    return how


def text_files() -> dict[str, bytes]:
    rows = [
        {"file_name": "a.png", "text": "a café\u2028by night", "split": None},
        {"file_name": "sub/b.png", "text": "b"},
    ]
    return {
        "metadata.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        "metadata.csv": 'file_name,text\na.png,"a café, by ""night"""\nsub/b.png,b\n'.encode("utf-8-sig"),
        "a.txt": "a café\r\nby night".encode("utf-16"),
        "templates.txt": b"{}\na picture of {}\n",
    }


def text_ends(name: str, seed: int, folder: Path) -> str:
    chance = random.Random(f"{name} {seed}")
    (folder / name).write_bytes(mutated(text_files()[name], chance))

    def read():
        data = CaptionedPictures(folder, 8, captions=chance.random() < 0.5)
        assert len(data) == len(data.captions) == len(data.images) > 0
        assert all(folder / row["file_name"] in pictures for row in data.rows), "a picture of somebody else"
        json.dumps(data.fingerprint), "".join(data.captions).encode()

    pictures = {folder / "a.png", folder / "sub/b.png"}
    how = ends(read, ValueError)
    (folder / name).unlink()
    return how


@pytest.fixture
def folder(tmp_path) -> Path:
    return with_pictures(tmp_path)


def with_pictures(folder: Path) -> Path:
    (folder / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "sub/b.txt").write_text("b")
    return folder


@pytest.fixture(autouse=True)
def no_program_yet():
    """Forget what other tests of this process have started."""
    STARTED.clear()


@pytest.fixture(autouse=True)
def small_bombs(monkeypatch):
    """So that a picture that claims to be enormous is refused before it takes the memory of a small machine."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_pictures_are_read_or_refused_in_one_sentence(kind, tmp_path):
    found = Counter(picture_ends(kind, seed, tmp_path) for seed in range(80))
    assert found["refused"] > 10 and found.total() == 80 and not STARTED


@pytest.mark.parametrize("name", TEXTS)
def test_damaged_captions_and_metadata_are_read_or_refused_in_one_sentence(name, folder):
    found = Counter(text_ends(name, seed, folder) for seed in range(60))
    assert found["read"] > 10 and found.total() == 60 and not STARTED


def main(count: int) -> None:
    import tempfile

    Image.MAX_IMAGE_PIXELS = 100_000
    for kinds, ends_of in ((FORMATS, picture_ends), (TEXTS, text_ends)):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                place, found = with_pictures(Path(folder)), Counter()
                for seed in range(count):
                    try:
                        found[ends_of(kind, seed, place)] += 1
                    except Exception as error:  # to be counted, and the seed to be printed
                        found[type(error).__name__] += 1
                        print(f"{kind} {seed}: {type(error).__name__}: {error}")
            print(kind, dict(found))
    print("programs started:", len(STARTED))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
