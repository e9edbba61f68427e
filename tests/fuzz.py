"""Damage files at random and read them: each has to load, or to be refused in one sentence.

    python -m tests.fuzz 10000                            that many files; prints a table of what became of them
    python -m tests.fuzz 1 --kind ckpt --first 4711       one of them again

The files are those of models, pictures, and the text files in a folder of pictures. `test_fuzz.py` runs a hundred of
each kind. A kind is a way to write whole files, a way to read them, and the ways in which they are damaged: add one to
KINDS. Damage number n of a kind is always the same.

    loaded       the damage was where nothing is read, or gave another valid file
    refused      with one of the errors that such a file may cause, in one line: CheckpointError, say
    traceback    any other error, or a message of several lines: a fault
    hang         more than TIME seconds of computing, or waiting: a fault
    code ran     something in the file made a folder, a file, a process or a connection: a fault
    crash        the process died: a fault
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minisd import CheckpointError, LatentDiffusion, LatentDiffusionConfig, UNetConfig, load, save
from minisd.clip import BPETokenizer, CLIPTextConfig
from minisd.data import CaptionedPictures
from minisd.pictures import open_picture, read_mask
from minisd.vae import AutoencoderConfig

TIME = 5.0  # seconds of computing; a sound file takes about 0.05
FAULTS = ("traceback", "hang", "code ran", "crash")
Damage = Callable[[random.Random, bytes], bytes]


# -- ways to damage a file ---------------------------------------------------------------------------------------------


def bytes_changed(rng: random.Random, data: bytes) -> bytes:
    """A few bytes overwritten, taken out, put in or repeated; or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # The beginning of a file, where its structure is, is hit as often as all the rest.
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 3000) + 1)
        long = rng.choice((1, 2, 8, 100))
        way = rng.randrange(5)
        if way == 0:
            data[at : at + long] = rng.randbytes(long)
        elif way == 1:
            del data[at : at + long]
        elif way == 2:
            data[at:at] = rng.choice((rng.randbytes(long), b"\x00" * long, b"\xff" * long, b"}", b'"', b"\xef\xbb\xbf"))
        elif way == 3:
            data[at:at] = data[at : at + long]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def bytes_moved(rng: random.Random, data: bytes) -> bytes:
    """One to four small damages: bits that flip, bytes that are lost, repeated, swapped for extremes, or cut off."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 16, 64))
        head, part, tail = data[:at], data[at : at + length], data[at + length :]
        kind = rng.choice(("flip", "lose", "repeat", "extreme", "noise", "cut", "move"))
        if kind == "flip":
            part = bytes(byte ^ (1 << rng.randrange(8)) for byte in part)
        elif kind == "lose":
            part = b""
        elif kind == "repeat":
            part *= rng.randint(2, 40)
        elif kind == "extreme":
            part = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"%", b"{", b'"', b"\n")) * length
        elif kind == "noise":
            part = rng.randbytes(length)
        elif kind == "cut":
            tail = b""
        else:
            part, tail = tail, part
        data = head + part + tail
    return data


def something_else(rng: random.Random, data: bytes) -> bytes:
    """What people give by mistake: an empty file, a web page, a pointer of git-LFS, UTF-16, noise."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    others = (b"", b"\x00" * 64, b"<!DOCTYPE html><html>404</html>", pointer, data.hex().encode(), rng.randbytes(999))
    return rng.choice((*others, data.decode("latin-1").encode("utf-16"), b"PK\x03\x04" + data, data + data))


def odd(rng: random.Random):
    """A value that nobody meant."""
    deep: list = []
    for _ in range(200):  # more than that, and it is Python's own json that can't write it
        deep = [deep]
    return rng.choice((
        None, True, False, 0, 1, -1, 5, 2**31, 10**9, -(10**9), 10**30, 0.5, 1e-300, 1e300, float("nan"), float("inf"),
        "", "a", "2", "../../etc/passwd", "v_prediction", "x" * 5000, "\u0000", "\ud800", [], {}, [1], [0] * 3000,
        {"a": {}}, deep,
    ))  # fmt: skip


def value_changed(rng: random.Random, content):
    """A copy of nested lists and dicts in which something was replaced, taken out, added or renamed."""
    if isinstance(content, dict | list) and content and rng.random() < 0.9:
        content = dict(content) if isinstance(content, dict) else list(content)
        key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
        way = rng.randrange(10)
        if way == 0:
            del content[key]
        elif way == 1 and isinstance(content, dict):
            content[rng.choice(("kind", "wings", key + "_", ""))] = content.pop(key) if rng.random() < 0.5 else odd(rng)
        else:
            content[key] = value_changed(rng, content[key])
        return content
    return odd(rng)


def json_changed(rng: random.Random, data: bytes) -> bytes:
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 3))):
        content = value_changed(rng, content)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def yaml_changed(rng: random.Random, data: bytes) -> bytes:
    import yaml

    text = yaml.safe_dump(value_changed(rng, yaml.safe_load(data)))
    if rng.random() < 0.1:  # a program; and a few lines that take up all memory
        text = rng.choice((
            "!!python/object/apply:os.mkdir [ran]",
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
            + text.replace("eps", "*i"),
        ))  # fmt: skip
    return text.encode("utf-8", "surrogatepass")


def lines_changed(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at : at + rng.randrange(3)] = [rng.choice((b"", b"a", b"a b c", b"\xff\xfe", lines[0], rng.choice(lines)))]
    return b"\n".join(lines)


def header_changed(rng: random.Random, data: bytes) -> bytes:
    """Of a safetensors file: the length of its header, or something in it."""
    length = int.from_bytes(data[:8], "little")
    header, numbers = json_changed(rng, data[8 : 8 + length]), data[8 + length :]
    stated = rng.choice((len(header),) * 8 + (0, 2**63, len(header) - 1, len(data)))
    return stated.to_bytes(8, "little") + header + numbers


# Programs in the language of pickle, which make a folder when they run.
PROGRAMS = (b"cos\nmkdir\n(X\x03\x00\x00\x00ranutR0", b"cposix\nsystem\n(X\x09\x00\x00\x00mkdir ranutR0",
            b"cbuiltins\nexec\n(X\x1d\x00\x00\x00import os;os.mkdir('ran')     utR0")  # fmt: skip


def record_changed(rng: random.Random, data: bytes) -> bytes:
    """Of a zip archive, with right checksums: a record that says something else, is lost, or is there twice."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(item.filename, archive.read(item)) for item in archive.infolist()]
    pickled = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    at = rng.choice((pickled, pickled, rng.randrange(len(records))))
    name, content = records[at]
    way = rng.randrange(8)
    if way == 0:
        content = content[:2] + rng.choice(PROGRAMS) + content[2:]
    elif way == 1:
        names = b"".join(b"clightning.a\nC%d\n0" % i for i in range(rng.choice((1, 300))))
        content = content[:2] + names + content[2:]
    elif way == 2:
        at, (name, _) = next((i, record) for i, record in enumerate(records) if record[0].endswith("byteorder"))
        content = rng.choice((b"big", b"", b"middle", b"little\n"))
    elif way == 3:
        name = rng.choice((name.upper(), name + "x", "../" + name, "a/data.pkl"))
    elif way == 4:
        # Numbers in the program of a pickle: sizes, places and strides of tensors.
        content = bytearray(content)
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        content = bytes(content)
    else:
        content = bytes_changed(rng, content)
    records[at] = (name, content)
    if way == 5:
        del records[at]
    if way == 6:
        records.append(records[at])
    file = io.BytesIO()
    packed = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", packed) as archive:
        warnings.simplefilter("ignore")  # of two records of one name
        for name, content in records:
            archive.writestr(name, content)
    return file.getvalue()


# -- kinds of files: models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    make: Callable[[Path], None]  # writes whole files into an empty folder
    read: Callable[[Path, Path], object]  # reads them; the second path is that of the file that is damaged
    files: str  # which of them are damaged, one at a time: a pattern
    ways: tuple[Damage, ...]
    refused: tuple[type[Exception], ...] = (CheckpointError, FileNotFoundError)  # what a damaged file may cause


def small_model() -> LatentDiffusion:
    torch.manual_seed(0)
    config = LatentDiffusionConfig(
        UNetConfig(model_channels=32, num_res_blocks=0, channel_mult=(1,), attention_resolutions=(), num_heads=2,
                   context_dim=32),
        AutoencoderConfig(ch=32, ch_mult=(1,), num_res_blocks=1),
        CLIPTextConfig(vocab_size=560, max_length=8, width=32, layers=1, heads=2, projection_dim=32),
        image_size=8,
    )  # fmt: skip
    return LatentDiffusion(config, BPETokenizer.train(["a red circle", "two blue squares"], vocab_size=540)).eval()


def draws(path: Path) -> None:
    """Load, and take one step: a configuration that loads has to be one that draws."""
    sd = load(path, "cpu")
    f = sd.config.first_stage.downsampling
    sd.txt2img("a red circle", steps=1, guidance_scale=1, height=2 * f, width=2 * f)


def minisd_folder(folder: Path) -> None:
    save(small_model(), folder / "m", dtype=torch.float16)


def compvis_file(suffix: str) -> Callable[[Path], None]:
    return lambda folder: save(small_model(), folder / f"m{suffix}", dtype=torch.float16)


def diffusers_folder(folder: Path) -> None:
    save(small_model(), folder / "m", layout="diffusers", dtype=torch.float16)


ANY = (bytes_changed, something_else)
KINDS = {
    "safetensors": Kind(minisd_folder, lambda f, _: load(f / "m", "cpu"), "m/model.safetensors",
                        (*ANY, header_changed)),
    "ckpt": Kind(compvis_file(".ckpt"), lambda f, _: load(f / "m.ckpt", "cpu"), "m.ckpt",
                 (*ANY, *[record_changed] * 4)),
    "config.json": Kind(minisd_folder, lambda f, _: draws(f / "m"), "m/config.json", (*ANY, *[json_changed] * 4)),
    "yaml": Kind(compvis_file(".safetensors"), lambda f, _: draws(f / "m.safetensors"), "m.yaml",
                 (*ANY, *[yaml_changed] * 4)),
    "tokenizer": Kind(minisd_folder, lambda f, _: draws(f / "m"), "m/tokenizer/*.json", (*ANY, *[json_changed] * 3)),
    "merges": Kind(minisd_folder, lambda f, _: draws(f / "m"), "m/tokenizer/merges.txt", (*ANY, *[lines_changed] * 3)),
    "diffusers": Kind(diffusers_folder, lambda f, _: draws(f / "m"), "m/**/*.json", (*ANY, *[json_changed] * 4)),
    "minisd folder": Kind(minisd_folder, lambda f, _: draws(f / "m"), "m/**/*.*", ANY),
}  # fmt: skip


# -- kinds of files: pictures, captions and metadata -------------------------------------------------------------------


def pictures(kind: str) -> Callable[[Path], None]:
    """Writes 24 small pictures of many modes, with what a camera or an editor writes beside the pixels."""

    def write(folder: Path) -> None:
        rng = random.Random(kind)
        modes = {"JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "L", "P", "1")}
        modes["GIF"] = ("P", "L")
        for number in range(24):
            mode = rng.choice(modes.get(kind, ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")))
            noise = np.frombuffer(rng.randbytes(12 * 16 * 4), np.uint8).reshape(12, 16, 4)
            if mode == "I;16":
                image = Image.fromarray(noise.view("<u2")[..., 0])
            else:
                image = Image.fromarray(noise, "RGBA").convert(mode)
            exif = Image.Exif()
            exif[0x0112] = rng.randint(1, 8)  # which side is up
            options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
            if kind in ("GIF", "WEBP", "TIFF", "PNG") and rng.random() < 0.3:
                options |= {"save_all": True, "append_images": [image.rotate(180)]}
            if kind == "TIFF":
                options["compression"] = rng.choice(("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"))
            image.save(folder / f"{number}.{FORMATS[kind]}", kind, **options)

    return write


def opens(_: Path, file: Path) -> None:
    """Open a picture by its path and by its bytes, which has to end alike, and read it as a mask."""
    try:
        read_mask(file, 8, 8)
    except (OSError, ValueError) as error:
        assert is_sentence(error), repr(error)
    try:
        open_picture(file.read_bytes())
    except OSError as error:
        assert is_sentence(error), repr(error)
        open_picture(file)  # raises the same
        raise AssertionError("its bytes were refused, and the file was not") from None
    try:
        open_picture(file)
    except OSError:
        raise AssertionError("the file was refused, and its bytes were not") from None


def captions(name: str) -> Callable[[Path], None]:
    """Writes two pictures with captions, and one file of text that says something about them."""
    rows = [
        {"file_name": "a.png", "text": "a café\u2028by night", "split": None},
        {"file_name": "sub/b.png", "text": "b"},
    ]
    texts = {
        "metadata.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        "metadata.csv": 'file_name,text\na.png,"a café, by ""night"""\nsub/b.png,b\n'.encode("utf-8-sig"),
        "a.txt": "a café\r\nby night".encode("utf-16"),
        "templates.txt": b"{}\na picture of {}\n",
    }

    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        for picture in ("a.png", "sub/b.png"):
            Image.new("RGB", (8, 8), "red").save(folder / picture)
        (folder / "sub/b.txt").write_text("b")
        (folder / name).write_bytes(texts[name])

    return write


def opens_as_data(folder: Path, _: Path) -> None:
    for wants_captions in (False, True):
        data = CaptionedPictures(folder, 8, captions=wants_captions)
        assert len(data) == len(data.captions) == len(data.images) > 0
        own = {folder / "a.png", folder / "sub/b.png"}
        assert all(folder / row["file_name"] in own for row in data.rows), "a picture of somebody else"
        json.dumps(data.fingerprint), "".join(data.captions).encode()


FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}
KINDS |= {kind: Kind(pictures(kind), opens, "*", (bytes_moved,), (OSError,)) for kind in FORMATS}
KINDS |= {name: Kind(captions(name), opens_as_data, name, (bytes_moved,), (ValueError,))
          for name in ("metadata.jsonl", "metadata.csv", "a.txt", "templates.txt")}  # fmt: skip
MOST_PIXELS = 100_000  # so that a picture that claims to be enormous is refused before a small machine's memory is full


# -- reading them ------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """No part of minisd catches it."""


watching, ran = False, []


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: whatever happens in this process while a damaged file is read."""
    if watching and event in ("os.system", "os.mkdir", "os.remove", "os.posix_spawn", "os.exec", "os.fork",
                              "os.startfile", "subprocess.Popen", "socket.connect", "shutil.rmtree"):  # fmt: skip
        ran.append(event)
    if watching and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        ran.append(f"open {arguments[0]}")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_):
        raise Hang

    before = [signal.signal(kind, stop) for kind in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, TIME)  # computing, however busy the machine is
    signal.setitimer(signal.ITIMER_REAL, 30 * TIME)  # waiting: for a pipe, a network
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(kind, handler)


def prepare(kind: str, folder: Path) -> None:
    """Write the whole files, and read them once: libraries that are imported later would look like code of the file."""
    if watch not in hooked:
        sys.addaudithook(watch)
        hooked.append(watch)
    KINDS[kind].make(folder)
    KINDS[kind].read(folder, next(path for path in folder.glob(KINDS[kind].files) if path.is_file()))


hooked: list = []


def is_sentence(error: Exception) -> bool:
    return 0 < len(str(error)) < 1500 and "\n" not in str(error)


def damaged_and_read(kind: str, number: int, folder: Path) -> tuple[str, str]:
    """Damage a file in the folder, read it, and put the whole file back. Returns the class, and what was said."""
    global watching
    rng = random.Random(f"{kind} {number}")
    file = rng.choice(sorted(path for path in folder.glob(KINDS[kind].files) if path.is_file()))
    whole, way = file.read_bytes(), rng.choice(KINDS[kind].ways)
    file.write_bytes(way(rng, whole))
    ran.clear()
    try:
        with warnings.catch_warnings(), time_limit():
            warnings.simplefilter("ignore")
            watching = True
            KINDS[kind].read(folder, file)
        found = "loaded", ""
    except KINDS[kind].refused as error:
        found = "refused" if is_sentence(error) else "traceback", str(error)
    except Hang:
        found = "hang", ""
    except Exception:
        found = "traceback", traceback.format_exc()
    finally:
        watching = False
        file.write_bytes(whole)
    if ran or (folder / "ran").exists() or Path("ran").exists():
        found = "code ran", str(ran)
    return found[0], f"{file.relative_to(folder)}, {way.__name__}: {found[1]}"


# -- the long version --------------------------------------------------------------------------------------------------


def in_a_child(kind: str, numbers: range, folder: Path) -> Iterator[tuple[int, str, str]]:
    """Read them in a process of its own, with 8 GB of memory, so that a crash is counted and does not end all."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)
        try:
            with os.fdopen(into, "w") as pipe:
                for number in numbers:
                    print(json.dumps((number, *damaged_and_read(kind, number, folder))), file=pipe, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(into)
    done = numbers.start
    with os.fdopen(out) as pipe:
        for line in pipe:
            found = tuple(json.loads(line))
            done = found[0] + 1
            yield found
    status = os.waitpid(child, 0)[1]
    if done < numbers.stop:
        yield done, "crash", f"exit status {status}"
        yield from in_a_child(kind, range(done + 1, numbers.stop), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, help="how many damaged files, of all kinds together")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--first", type=int, default=0, help="the number of the first damage")
    given = parser.parse_args()
    kinds = [given.kind] if given.kind else list(KINDS)
    classes = ("loaded", "refused", *FAULTS)
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    print(f"{'':<15}" + "".join(f"{name:>11}" for name in classes))
    total: Counter = Counter()
    for kind in kinds:
        counts: Counter = Counter()
        with tempfile.TemporaryDirectory() as folder:
            prepare(kind, Path(folder))
            numbers = range(given.first, given.first + -(-given.count // len(kinds)))
            for number, found, said in in_a_child(kind, numbers, Path(folder)):
                counts[found] += 1
                if found in FAULTS or given.count == 1:
                    print(f"{kind} {number}: {found}: {said}", file=sys.stderr)
        total += counts
        print(f"{kind:<15}" + "".join(f"{counts[name]:>11,}" for name in classes), flush=True)
    print(f"{'all':<15}" + "".join(f"{total[name]:>11,}" for name in classes))
    sys.exit(any(total[name] for name in FAULTS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
