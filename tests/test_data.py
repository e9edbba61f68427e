"""Captioned pictures: any folder can be read, every corpus can be trusted. No test needs a network or npm."""

import base64
import errno
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import minisd.data.captioned_pictures as captioned_pictures
import minisd.data.emoji as emoji
import minisd.data.folder as folder
import minisd.data.packages as packages
import minisd.data.sample_pictures as sample_pictures
import minisd.data.shapes as shapes
import minisd.data.split as split
from docs import cut_sample
from minisd.data import CaptionedPictures, build_emoji, draw_shapes, fetch_dataset, photograph, sample, shape_corpus
from minisd.data.concepts import Concept, concepts, family, join, plain, slug
from minisd.data.packages import FIRST_STYLES, STYLES, Package
from minisd.data.scenes import build_scenes


def picture(colour="red", size=(8, 8), mode="RGB") -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def concept(name: str, codepoint: str = "1F600", group: str = "objects") -> Concept:
    return Concept(name, codepoint, group, "", (), family(name, group))


# Reading: pictures of every kind -----------------------------------------------------------------------------------


def one(path: Path, **options) -> np.ndarray:
    """The only picture of a folder, after captioning it."""
    path.with_suffix(".txt").write_text("a picture")
    return CaptionedPictures(path.parent, **options).images[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
def test_a_picture_of_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture("white", mode=mode).save(path)
    assert one(path).shape == (8, 8, 3)
    assert (one(path) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    transparent.putpixel((3, 3), (0, 0, 0, 255))
    path = tmp_path / "a.png"
    transparent.convert(mode).save(path)
    assert one(path)[0, 0].tolist() == [255, 255, 255]
    assert one(path)[3, 3].tolist() == [0, 0, 0]


def test_sixteen_bits_a_pixel_keep_their_greys(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "a.png")
    assert (one(tmp_path / "a.png") == 127).all()


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    upright = picture("blue", (8, 8))
    upright.paste("red", (0, 0, 8, 4))  # red at the top
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    upright.rotate(180).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(one(tmp_path / "a.png"), np.asarray(upright))


def test_the_centre_of_a_wide_picture_is_kept(tmp_path):
    wide = picture("blue", (30, 10))
    wide.paste("red", (10, 0, 20, 10))
    wide.save(tmp_path / "a.webp", lossless=True)
    assert (one(tmp_path / "a.webp", size=5) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [4, 3, 20])
def test_pictures_are_resized_without_aliasing(tmp_path, size):
    stripes = np.zeros((12, 12, 3), np.uint8)
    stripes[:, ::2] = 200  # one pixel wide: what takes every n-th pixel sees all black or all bright
    Image.fromarray(stripes).save(tmp_path / "a.png")
    read = one(tmp_path / "a.png", size=size)
    assert read.shape == (size, size, 3)
    assert read.mean() == pytest.approx(100, abs=18)
    if size == 4:  # means of whole pixels: of 3 columns, one bright or two
        assert sorted(set(read.flatten())) == [67, 133]


def test_without_a_size_no_picture_is_enlarged(tmp_path):
    for name, size in [("a", (16, 24)), ("b", (10, 12))]:
        picture(size=size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    assert CaptionedPictures(tmp_path).images.shape == (2, 10, 10, 3)


# Reading: folders of every kind ------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """What people have: captions beside pictures, subfolders, and a mess."""
    (tmp_path / "more").mkdir()
    for name, colour in [("one.png", "red"), ("two.JPG", "green"), ("more/three.jpeg", "blue")]:
        picture(colour).save(tmp_path / name, quality=100)
        (tmp_path / name).with_suffix(".txt").write_text(f"  a {colour}\nsquare \n")
    return tmp_path


def spoil(folder: Path) -> None:
    (folder / "empty.png").touch()
    (folder / "empty.txt").write_text("nothing")
    (folder / "half.png").write_bytes((folder / "one.png").read_bytes()[:50])
    (folder / "half.txt").write_text("half a square")
    (folder / "words.webp").write_text("I am no picture")
    (folder / "words.txt").write_text("words")
    picture().save(folder / "mute.png")
    picture().save(folder / "blank.png")
    (folder / "blank.txt").write_text(" \n")


def test_captions_are_read_from_text_files_beside_the_pictures(own_folder):
    data = CaptionedPictures(own_folder)
    assert data.captions == ["a blue square", "a red square", "a green square"]
    assert [row["file_name"] for row in data.rows] == ["more/three.jpeg", "one.png", "two.JPG"]
    assert data.skipped == []


def test_what_cannot_be_used_is_counted_named_and_left_out(own_folder):
    spoil(own_folder)
    with pytest.warns(UserWarning, match="5 of 8 left out") as caught:
        data = CaptionedPictures(own_folder)
    assert len(caught) == 1
    assert len(data) == 3 and len(data.images) == 3
    reasons = dict(data.skipped)
    assert reasons["empty.png"] == "the file is empty"
    assert reasons["mute.png"] == reasons["blank.png"] == "no caption"
    assert "not a readable picture" in reasons["half.png"] and "not a readable picture" in reasons["words.webp"]
    assert all(name in str(caught[0].message) for name in reasons)


def test_broken_lines_and_missing_files_of_metadata_are_left_out(own_folder):
    lines = ['{"file_name": "one.png", "text": "first"}', "", "{half", '{"text": "no file"}', '["one.png"]',
             '{"file_name": "gone.png", "text": "gone"}', '{"file_name": "one.png", "text": 3}']  # fmt: skip
    (own_folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"metadata.jsonl:3 .*metadata.jsonl:7"):
        data = CaptionedPictures(own_folder)
    assert data.captions == ["first"]
    assert dict(data.skipped)["gone.png"] == "the file is missing"
    assert dict(data.skipped)["two.JPG"] == "no line in metadata.jsonl"


def test_pictures_come_as_tensors_with_their_captions(own_folder):
    data = CaptionedPictures(own_folder, size=4)
    x, caption = data[1]
    assert x.shape == (3, 4, 4) and x.dtype == torch.float32
    assert caption == "a red square"
    assert x[0].min() > 0.9 and x[1:].max() < -0.9, "red is 1 in the first channel, -1 in the others"
    assert torch.equal(data[-1][0], data[2][0])
    assert len(list(data)) == len(data) == 3
    for indices in ([2, 0], torch.tensor([2, 0]), np.array([2, 0])):
        assert torch.equal(data.batch(indices), torch.stack([data[2][0], data[0][0]]))
    with pytest.raises(IndexError):
        data[3]


def test_a_fingerprint_tells_other_pictures_and_other_captions(own_folder):
    def fingerprint():
        return CaptionedPictures(own_folder, 16).fingerprint

    before = fingerprint()
    assert before.startswith("3 pictures of 16x16 (") and fingerprint() == before
    seen = {before, CaptionedPictures(own_folder, 8).fingerprint}
    (own_folder / "one.txt").write_text("a crimson square")
    seen.add(fingerprint())
    (own_folder / "one.png").rename(own_folder / "first.png")
    (own_folder / "one.txt").rename(own_folder / "first.txt")
    seen.add(fingerprint())
    (own_folder / "two.txt").unlink()
    seen.add(fingerprint())
    assert len(seen) == 5


def test_pictures_that_do_not_fit_into_memory_are_read_when_asked_for(own_folder, monkeypatch):
    spoil(own_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = CaptionedPictures(own_folder, size=4)
        monkeypatch.setattr(captioned_pictures, "IN_MEMORY", 0)
        read = CaptionedPictures(own_folder, size=4)
    assert "images" not in vars(read) and read.captions == kept.captions
    assert torch.equal(read.batch([2, 0]), kept.batch([2, 0]))
    assert np.array_equal(read.images, kept.images)


@pytest.mark.parametrize("text", ["{}\na {}\n", "\n  {}  \r\n\na {}"])
def test_the_templates_of_a_folder_are_the_lines_of_a_file(own_folder, text):
    assert CaptionedPictures(own_folder).templates == ("{}",), "captions of people are taken as they are"
    (own_folder / "templates.txt").write_text(text)
    assert CaptionedPictures(own_folder).templates == ("{}", "a {}")


@pytest.mark.parametrize(
    ("text", "found"),
    [("a picture", '"a picture"'), ("{}\n{} and {}", '"{} and {}"'), ("{0}", '"{0}"'), ("{}}", '"{}}"'),
     ("", "nothing"), (" \n", "nothing")],
)  # fmt: skip
def test_templates_that_cannot_be_used_are_one_clear_sentence(own_folder, text, found):
    (own_folder / "templates.txt").write_text(text)
    with pytest.raises(ValueError) as refused:
        CaptionedPictures(own_folder)
    assert str(refused.value).startswith(f"{own_folder / 'templates.txt'} holds {found}: write one form of a caption a")
    assert "\n" not in str(refused.value)


FOX = "a café fox"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with its mark"])
@pytest.mark.parametrize("kind", ["a.txt", "metadata.jsonl", "metadata.csv", "templates.txt"])
def test_text_is_read_as_windows_and_others_save_it(tmp_path, kind, encoding):
    picture().save(tmp_path / "a.png")
    text = {
        "a.txt": FOX + "\r\n",
        "metadata.jsonl": json.dumps({"file_name": "a.png", "text": FOX}, ensure_ascii=False),
        "metadata.csv": f'file_name,text\r\na.png,"{FOX}"\r\n',
        "templates.txt": "{}\r\nthe café's {}",
    }[kind]
    if kind == "templates.txt":
        (tmp_path / "a.txt").write_text(FOX, encoding="utf-8")
    data = b"\xff\xfe" + text.encode("utf-16-le") if "mark" in encoding else text.encode(encoding)
    (tmp_path / kind).write_bytes(data)
    read = CaptionedPictures(tmp_path)
    assert read.captions == [FOX] and read.skipped == []
    assert kind != "templates.txt" or read.templates == ("{}", "the café's {}")


def test_a_caption_in_an_older_encoding_is_read_and_named_and_no_other_text_is_guessed(own_folder):
    (own_folder / "one.txt").write_bytes("a café".encode("cp1252"))
    (own_folder / "two.txt").write_bytes("un éléphant".encode("cp1252"))
    (own_folder / "more/three.txt").write_bytes("a fox".encode("utf-16-le"))  # without its mark
    with pytest.warns(UserWarning) as caught:
        assert CaptionedPictures(own_folder).captions == ["a café", "un éléphant"]
    said = sorted(str(warning.message) for warning in caught)
    assert any("one.txt is not text in UTF-8 (byte 5 is 0xe9), nor are 1 others: read as Windows" in s for s in said)
    assert any("three.txt is not text in UTF-8 (byte 1 is 0x00): save it as UTF-8" in s for s in said)
    for name in ("templates.txt", "metadata.jsonl"):
        (own_folder / name).write_bytes('{"file_name": "one.png", "text": "café {}"}'.encode("cp1252"))
        with pytest.raises(ValueError, match=f"{name} is not text in UTF-8 .byte 3[0-9] is 0xe9.: save it as UTF-8"):
            CaptionedPictures(own_folder)
        (own_folder / name).unlink()


def rows_in(folder: Path, text: str, name: str = "metadata.jsonl", **options) -> CaptionedPictures:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CaptionedPictures(folder, **options)


def test_a_line_of_metadata_ends_where_json_says(own_folder):
    lines = [f'{{"file_name": "{n}", "text": "a{end}b"}}' for n, end in (("one.png", "\u2028"), ("two.JPG", "\x85"))]
    assert rows_in(own_folder, "\n".join(lines)).captions == ["a\u2028b", "a\x85b"]


@pytest.mark.parametrize("name", ["../mine.png", "more/../../mine.png", "/mine.png", "..", "one.png/../../mine.png"])
def test_a_name_that_leads_out_of_the_folder_is_refused(own_folder, name):
    picture().save(own_folder.parent / "mine.png")
    name = str(own_folder.parent) + name if name[0] == "/" else name
    rows = [json.dumps({"file_name": n, "text": "a picture"}) for n in (name, "more/../one.png")]
    data = rows_in(own_folder, "\n".join(rows))
    assert [row["file_name"] for row in data.rows] == ["one.png"]
    assert data.skipped[0] == ("metadata.jsonl:1", "the file_name leads out of the folder")


@pytest.mark.parametrize(
    "row", [{"text": "\ud800"}, {"file_name": "\ud800"}, {"file_name": "a\0.png"}, {"file_name": "n" * 999}]
)
def test_a_row_that_no_file_can_have_is_left_out(own_folder, row):
    rows = [{"file_name": "two.JPG", "text": "a"} | row, {"file_name": "one.png", "text": "one"}]
    data = rows_in(own_folder, "[" * 100_000 + "\n" + "\n".join(map(json.dumps, rows)))
    assert (
        data.captions == ["one"] and ("metadata.jsonl:1", "no JSON object with a file_name and a text") in data.skipped
    )


def test_rows_with_an_empty_split_are_for_training(own_folder):
    assert len(rows_in(own_folder, '{"file_name": "one.png", "text": "a", "split": null}', split="train")) == 1
    (own_folder / "metadata.jsonl").unlink()
    assert len(rows_in(own_folder, "file_name,text,split\none.png,a,\n", "metadata.csv", split="train")) == 1


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_table_is_read_whatever_stands_between_its_columns(own_folder, mark):
    lines = [["file_name", "text", "concept"], ["one.png", '"a ""red"", round\nfox"', "fox"], ["two.JPG", "b", "cat"]]
    data = rows_in(own_folder, "\r\n".join(mark.join(line) for line in lines), "metadata.csv")
    assert data.captions == ['a "red", round\nfox', "b"] and data.column("concept") == ["fox", "cat"]
    assert dict(data.skipped) == {"more/three.jpeg": "no line in metadata.csv"}


def test_a_table_that_cannot_be_read_is_one_clear_sentence(own_folder):
    with pytest.raises(ValueError, match=r"metadata.csv:1 cannot be read \(field larger than field limit"):
        rows_in(own_folder, "file_name,text\none.png," + "x" * 200_000, "metadata.csv")


def test_metadata_in_a_subfolder_names_what_is_beside_it(own_folder):
    rows_in(
        own_folder,
        '{"file_name": "three.jpeg", "text": "near"}\n{"file_name": "../two.JPG", "text": "up"}',
        "more/metadata.jsonl",
    )
    data = rows_in(
        own_folder, '{"file_name": "more/three.jpeg", "text": "far"}\n{"file_name": "one.png", "text": "one"}'
    )
    assert {row["file_name"]: row["text"] for row in data.rows} == {
        "more/three.jpeg": "near",
        "two.JPG": "up",
        "one.png": "one",
    }
    assert data.skipped == [("metadata.jsonl:1", "more/three.jpeg is in more/metadata.jsonl, too")]
    data = rows_in(own_folder, "file_name,text\none.png,from the table\n", "metadata.csv")
    assert ("metadata.csv:2", "one.png is in metadata.jsonl, too") in data.skipped and "one" in data.captions


def test_a_terminal_is_not_commanded_by_a_name(own_folder):
    row = json.dumps({"file_name": "\x1b]0;title\x07.png", "text": "a"})
    (own_folder / "metadata.jsonl").write_text(row + '\n{"file_name": "one.png", "text": "one"}')
    with pytest.warns(UserWarning) as caught:
        CaptionedPictures(own_folder)
    assert "\\x1b]0;title\\x07.png (the file is missing)" in str(caught[0].message) and "\x1b" not in str(
        caught[0].message
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_no_file_and_nobody_waits_for_it(own_folder):
    for name in ("pipe.png", "one.txt", "metadata.jsonl", "pictures.npy", "templates.txt", "recipe.json"):
        (own_folder / name).unlink(missing_ok=True)
        os.mkfifo(own_folder / name)
    with pytest.raises(ValueError, match="metadata.jsonl is not a file"):
        CaptionedPictures(own_folder)
    (own_folder / "metadata.jsonl").unlink()
    assert folder.read_recipe(own_folder) == {}
    with pytest.warns(UserWarning, match="2 of 4 left out"):
        assert dict(CaptionedPictures(own_folder).skipped)["one.png"].endswith("one.txt is not a file")


@pytest.mark.parametrize("name", ["a.bmp", "a.gif", "a.tif", "a.tiff", "a.webp", "a.png"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_folder_may_hold_pictures_in_any_usual_format(tmp_path, name, mode):
    picture("red", mode=mode).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    assert np.array_equal(one(tmp_path / name), np.asarray(picture("red", mode=mode).convert("RGB")))


@pytest.fixture
def classes(tmp_path) -> Path:
    """An imagefolder: pictures without captions, in folders that are named after what they show."""
    for name, colour in [("cat/1", "red"), ("cat/2", "green"), ("fox/old/1", "blue"), ("fox/1", "black")]:
        (tmp_path / f"{name}.png").parent.mkdir(exist_ok=True, parents=True)
        picture(colour).save(tmp_path / f"{name}.png")
    (tmp_path / "cat" / "1.txt").write_text("a red cat")
    return tmp_path


def test_pictures_without_captions_are_taken_where_none_are_needed(classes):
    data = CaptionedPictures(classes, captions=False)
    assert data.captions == ["a red cat", "", "", ""] and data.skipped == []
    assert torch.equal(data.batch([3])[0], data[3][0]) and data[3][1] == ""
    assert data.fingerprint.startswith("4 pictures of 8x8 (")
    with pytest.warns(UserWarning, match=r"3 of 4 left out: cat/2.png \(no caption\)"):
        assert CaptionedPictures(classes).captions == ["a red cat"]


def test_rows_without_captions_are_taken_where_none_are_needed(corpus):
    rows = [{"file_name": "images/0.png", "concept": "fox"}, {"file_name": "images/1.png", "text": None, "concept": 3},
            {"file_name": "images/2.png", "text": "two", "concept": "cat"}]  # fmt: skip
    lines = [json.dumps(row) for row in rows] + ['{"text": "no file"}', '{"file_name": "images/3.png", "text": 3}']
    (corpus / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"metadata.jsonl:4 \(no JSON object with a file_name\), metadata.jsonl:5"):
        data = CaptionedPictures(corpus, captions=False)
    assert data.captions == ["", "", "two"] and data.column("concept") == ["fox", 3, "cat"]


def test_the_class_of_a_picture_is_the_name_of_its_folder(classes):
    assert CaptionedPictures(classes, captions=False).column("folder") == ["cat", "cat", "fox", "old"]
    picture().save(classes / "stray.png")
    sentence = r'1 of 5 pictures in .* have no "folder", such as stray.png: sort all pictures into subfolders and name'
    with pytest.raises(ValueError, match=sentence):
        CaptionedPictures(classes, captions=False).column("folder")


def test_the_class_of_a_picture_is_a_column_of_its_metadata(corpus):
    assert sample().column("concept")[0] == "grinning face"
    with pytest.raises(ValueError, match=r'1 of 5 .* "split", such as images/4.png: write one into each line of meta'):
        CaptionedPictures(corpus).column("split")


def test_a_folder_without_any_picture_is_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no picture that can be used: .*\(file_name\), or pictures \(.png.*p\)\.$"):
        CaptionedPictures(tmp_path, captions=False)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Five random pictures as a corpus: two splits, one row without."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    splits = ["train", "test_pair", "train", "test_pair"]
    rows = [{"file_name": f"images/{i}.png", "text": f"picture {i}", "split": s} for i, s in enumerate(splits)]
    rows.append({"file_name": "images/4.png", "text": "picture 4"})
    folder.write_corpus(tmp_path / "corpus", rows, noise, {"made_by": "a test"}, {"NOTICE": "mine"})
    return tmp_path / "corpus"


@pytest.mark.parametrize("size", [None, 16, 8, 5, 20])
@pytest.mark.parametrize("part", [None, "train", "test_pair"])
def test_packed_pictures_equal_the_files(corpus, size, part):
    packed = CaptionedPictures(corpus, size, part)
    assert packed._packed is not None
    (corpus / "pictures.npy").unlink()
    files = CaptionedPictures(corpus, size, part)
    assert files._packed is None
    assert packed.rows == files.rows and packed.size == files.size
    assert np.array_equal(packed.images, files.images)
    assert torch.equal(packed.batch([1, 0]), files.batch([1, 0]))


@pytest.mark.parametrize("change", ["reordered", "shortened", "cut", "other", "grey", "no sheet"])
def test_packed_pictures_that_no_longer_match_are_not_used(corpus, change):
    lines = (corpus / "metadata.jsonl").read_text().splitlines()
    if change == "reordered":
        (corpus / "metadata.jsonl").write_text("\n".join(lines[::-1]))
    if change == "shortened":
        (corpus / "metadata.jsonl").write_text("\n".join(lines[1:]))
        (corpus / "images/0.png").unlink()
    if change == "cut":
        (corpus / "pictures.npy").write_bytes((corpus / "pictures.npy").read_bytes()[:500])
    if change == "other":
        np.save(corpus / "pictures.npy", np.zeros(5))
    if change == "grey":
        np.save(corpus / "pictures.npy", np.load(corpus / "pictures.npy")[..., :1])
    if change == "no sheet":
        (corpus / "pictures.npy").unlink()
        picture(size=(50, 50)).save(corpus / "pictures.webp")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* left out: pictures.webp \(no line in metadata.jsonl\)")
        data = CaptionedPictures(corpus)
    for image, row in zip(data.images, data.rows, strict=True):
        assert np.array_equal(image, captioned_pictures.decode_file(corpus / row["file_name"]))


@pytest.mark.parametrize(
    "change", ["painted", "replaced by an older one", "swapped", "deleted", "same size and time of all"]
)
@pytest.mark.parametrize("record", [True, False])
def test_what_is_seen_is_the_pictures_and_not_a_stale_copy(corpus, record, change):
    if not record:  # as an earlier version of minisd wrote it
        np.save(corpus / "pictures.npy", np.load(corpus / "pictures.npy"))
        for path in corpus.glob("images/*"):
            os.utime(path, (1, 1))
    first, third = corpus / "images/1.png", corpus / "images/3.png"
    assert CaptionedPictures(corpus)._packed is not None
    expected = CaptionedPictures(corpus).images.copy()
    if change == "painted":
        picture("red", (16, 16)).save(third)
        expected[3] = (255, 0, 0)
    elif change == "replaced by an older one":
        picture("red", (16, 16)).save(corpus / "new.png")
        os.utime(corpus / "new.png", (1, 1))
        (corpus / "new.png").replace(third)
        expected[3] = (255, 0, 0)
    elif change == "swapped":
        first.rename(corpus / "x.png")
        third.rename(first)
        (corpus / "x.png").rename(third)
        expected[[1, 3]] = expected[[3, 1]]
    elif change == "deleted":
        third.unlink()
        expected = np.delete(expected, 3, axis=0)
    else:  # as archives do, which keep no times
        picture("red", (16, 16)).save(third)
        for path in (*corpus.glob("images/*"), corpus / "pictures.npy"):
            os.utime(path, (1, 1))
        expected[3] = (255, 0, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* 1 of 5 left out: images/3.png \(the file is missing\)")
        assert np.array_equal(CaptionedPictures(corpus).images, expected)


def test_pictures_that_did_not_change_are_not_compared(corpus, monkeypatch):
    decoded = []
    decode = captioned_pictures.decode_file
    monkeypatch.setattr(captioned_pictures, "decode_file", lambda *given: decoded.append(given) or decode(*given))
    assert CaptionedPictures(corpus)._packed is not None and decoded == []
    os.utime(corpus / "images/2.png")
    assert CaptionedPictures(corpus)._packed is not None and len(decoded) == 1


@pytest.mark.parametrize("damage", ["a zip archive", "a pickle", "an enormous shape", "noise behind the pictures"])
def test_a_damaged_copy_is_not_believed(corpus, damage):
    expected, path = CaptionedPictures(corpus).images.copy(), corpus / "pictures.npy"
    if damage == "a zip archive":
        np.savez(corpus / "a.npz", a=np.zeros(3))
        (corpus / "a.npz").replace(path)
    elif damage == "a pickle":
        np.save(path, np.array([{}]), allow_pickle=True)
    elif damage == "an enormous shape":
        path.write_bytes(path.read_bytes().replace(b"(5, ", b"(5" + b"0" * 20 + b", ", 1))
    else:
        path.write_bytes(path.read_bytes()[:-200] + bytes(range(200)))
    assert np.array_equal(CaptionedPictures(corpus).images, expected)


def test_a_file_that_breaks_later_is_named(corpus):
    (corpus / "images/0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 5 left out: images/0.png \(the file is empty\)"):
        assert len(CaptionedPictures(corpus)) == 4


def test_rows_without_a_split_are_for_training(corpus):
    assert CaptionedPictures(corpus, split="train").captions == ["picture 0", "picture 2", "picture 4"]
    assert CaptionedPictures(corpus, split="test_pair").captions == ["picture 1", "picture 3"]
    assert len(CaptionedPictures(corpus)) == 5


def test_errors_of_reading_are_one_clear_sentence(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        CaptionedPictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match='no pictures in the split "test"; it has test_pair, train'):
        CaptionedPictures(corpus, split="test")
    with pytest.raises(ValueError, match="size is 0"):
        CaptionedPictures(corpus, size=0)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no captioned picture that can be used"):
        CaptionedPictures(tmp_path / "bare")
    picture().save(tmp_path / "bare" / "mute.png")
    with pytest.raises(ValueError, match=r"left out: mute.png \(no caption\)"):
        CaptionedPictures(tmp_path / "bare")


# Writing -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_corpus(corpus, monkeypatch):
    before = CaptionedPictures(corpus).images.copy()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.write_corpus(corpus, [{"file_name": "images/new.png", "text": "new"}], before[:1], {})
    monkeypatch.undo()
    assert sorted(os.listdir(corpus)) == ["NOTICE", "images", "metadata.jsonl", "pictures.npy", "recipe.json"]
    assert np.array_equal(CaptionedPictures(corpus).images, before)


def test_a_write_that_fails_late_leaves_no_corpus(corpus, monkeypatch):
    """While the pictures are being replaced there is no metadata.jsonl: that says that the corpus is not complete."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        folder.write_corpus(
            corpus, [{"file_name": "images/a.png", "text": "a"}], np.zeros((1, 8, 8, 3), np.uint8), {"a": 1}
        )
    assert not (corpus / "metadata.jsonl").exists()
    assert not folder.already_there(corpus, {"a": 1})


def test_a_full_disk_is_one_clear_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="The disk is full: free some space for"):
        draw_shapes(tmp_path, count=2)
    assert not (tmp_path / "metadata.jsonl").exists()


def test_pictures_of_somebody_else_are_not_overwritten(own_folder):
    (own_folder / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "mine"}')
    with pytest.raises(ValueError, match="holds other captioned pictures"):
        draw_shapes(own_folder, count=2)


COMMANDS = {
    "data shapes": lambda out: draw_shapes(out, count=3, size=16),
    "data emoji": lambda out: build_emoji(out, size=16),
    "data hub": lambda out: fetch_dataset("no/such-set", out),
}
FOUND = {
    "pictures without metadata": "is not empty \\(it holds images\\)",
    "pictures and other files": "is not empty \\(it holds images and 2 more\\)",
    "a note": "is not empty \\(it holds note.txt\\)",
    "packages of another kind": "is not empty \\(it holds packages\\)",
    "captioned pictures": "holds other captioned pictures",
    "captioned pictures and a recipe": "holds other captioned pictures",
    "a corpus of another command": "holds a corpus of `minisd data (shapes|hub)`",
    "an unfinished corpus of another command": "holds an unfinished corpus of `minisd data (shapes|hub)`",
    "a file": "is not a folder",
    "a link to pictures": "is not empty \\(it holds images\\)",
    "a link to nothing": "is not a folder",
}


def make(out: Path, what: str, command: str) -> None:
    """What somebody has at the place where a corpus is to go."""
    other = "fetch_dataset" if command == "data shapes" else "draw_shapes"
    if what == "a file":
        out.write_text("mine")
    elif what == "a link to nothing":
        out.symlink_to(out.with_name("gone"))
    else:
        real = out.with_name("elsewhere") if what == "a link to pictures" else out
        real.mkdir()
        if what == "a note":
            (real / "note.txt").write_text("mine")
        elif what == "packages of another kind":
            (real / "packages").mkdir()
            (real / "packages" / "mine.py").write_text("mine")
        else:
            (real / "images").mkdir()
            picture().save(real / "images" / "holiday.png")
        if what == "pictures and other files":
            (real / "pictures.npy").write_text("mine")
            (real / "recipe.json").write_text('{"made_by": "draw_shapes"}')  # which alone proves nothing
        if "captioned" in what or what == "a corpus of another command":
            (real / "metadata.jsonl").write_text('{"file_name": "images/holiday.png", "text": "mine"}')
        if what == "captioned pictures and a recipe":
            (real / "recipe.json").write_text('["flour", "eggs"]')
        if what == "a corpus of another command":
            hub = {"source": "s", "split": "train", "image": "image", "text": "text", "size": 8, "count": None}
            recipe = hub if other == "fetch_dataset" else {"made_by": other, "count": 1}
            (real / "recipe.json").write_text(json.dumps(recipe))
        if what == "an unfinished corpus of another command":
            (real / folder.unfinished_by(other)).mkdir()
        if what == "a link to pictures":
            out.symlink_to(real)


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything under a path: the names, and what is in the files."""
    found = sorted([path, *path.rglob("*")])
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in found}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", FOUND)
def test_a_command_only_replaces_what_it_has_made_itself(tmp_path, what, command):
    make(tmp_path / "out", what, command)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=FOUND[what] + ".* give a new or an empty") as refused:
        COMMANDS[command](tmp_path / "out")
    assert str(tmp_path / "out") in str(refused.value) and "\n" not in str(refused.value)
    assert tree(tmp_path) == before


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    draw_shapes(tmp_path / "link", count=3)
    assert (tmp_path / "link").is_symlink() and len(CaptionedPictures(tmp_path / "empty")) == 3


def test_a_corpus_with_a_picture_of_somebody_else_in_it_is_not_replaced(tmp_path):
    draw_shapes(tmp_path / "out", count=3)
    picture().save(tmp_path / "out" / "images" / "holiday.png")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"images/holiday.png in it is not in its metadata.jsonl: move that"):
        draw_shapes(tmp_path / "out", count=4)
    assert draw_shapes(tmp_path / "out", count=3) == tmp_path / "out", "there is nothing to do"
    assert tree(tmp_path) == before
    (tmp_path / "out" / "images" / "holiday.png").unlink()
    assert len(CaptionedPictures(draw_shapes(tmp_path / "out", count=4))) == 4


def test_a_folder_that_cannot_be_made_or_written_to_is_one_clear_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the folder .*below cannot be made \(Not a directory\): give another"):
        draw_shapes(tmp_path / "file" / "below", count=3)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="out cannot be written to: give another folder"):
        draw_shapes(tmp_path / "out", count=3)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("command", COMMANDS)
def test_two_commands_do_not_write_into_one_folder(tmp_path, command):
    fcntl = pytest.importorskip("fcntl")
    program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)"
    holding = [sys.executable, "-c", program + "; print(flush=True); input()", str(tmp_path)]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=f"another process writes into {tmp_path}: wait for it to end"):
            COMMANDS[command](tmp_path)
        assert os.listdir(tmp_path) == []
        other.kill()  # -9, and yet the folder is free at once
    draw_shapes(tmp_path, count=3)
    held = []
    with folder.corpus_folder(tmp_path, {"made_by": "draw_shapes"}):  # a command holds it while it works, no longer
        with pytest.raises(ValueError, match="another process writes into"):
            draw_shapes(tmp_path, count=3)
        held.append(True)
    assert held and len(CaptionedPictures(draw_shapes(tmp_path, count=4))) == 4
    fcntl.flock(handle := os.open(tmp_path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_a_function_of_your_own_replaces_only_what_it_has_made(tmp_path):
    def my_corpus(out, count):
        recipe = {"made_by": "my_corpus", "count": count}
        with folder.corpus_folder(out, recipe) as complete:
            if not complete:
                rows = [{"file_name": f"images/{i}.png", "text": "mine"} for i in range(count)]
                folder.write_corpus(out, rows, np.zeros((count, 8, 8, 3), np.uint8), recipe)
        return out

    assert len(CaptionedPictures(my_corpus(tmp_path / "mine", 2))) == 2
    assert len(CaptionedPictures(my_corpus(tmp_path / "mine", 3))) == 3
    with pytest.raises(ValueError, match="other captioned pictures, and `minisd data shapes` replaces only what"):
        draw_shapes(tmp_path / "mine", count=3)
    with pytest.raises(ValueError, match="a corpus of `minisd data shapes`, and `my_corpus` replaces only what"):
        my_corpus(draw_shapes(tmp_path / "shapes", count=3), 2)


def killed_before(operation: int, work) -> bool:
    """Do the work in another process, which dies at once before its n-th operation on files; False if it ends first."""
    child = os.fork()
    if child == 0:
        left = itertools.count(operation, -1)
        on_files = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        sys.addaudithook(lambda event, _: os._exit(9) if event in on_files and next(left) == 0 else None)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("replacing", [False, True])
def test_a_command_that_was_killed_at_any_moment_can_be_given_again(tmp_path, replacing):
    whole = tree(draw_shapes(tmp_path / "whole", count=2, size=8))
    for operation in range(1000):
        out = tmp_path / f"out{operation}"
        if replacing:
            draw_shapes(out, count=1, size=8)
        before = tree(out)
        killed = killed_before(operation, lambda: draw_shapes(out, count=2, size=8))  # noqa: B023
        if (out / "metadata.jsonl").exists():  # the old corpus, or the new one
            left = {name: data for name, data in tree(out).items() if not name.startswith(".unfinished")}
            assert left in (before, whole)
        draw_shapes(out, count=2, size=8)
        assert tree(out) == whole, f"killed before its operation {operation}"
        if not killed:
            break
    assert 10 < operation < 999, "it was killed again and again, and in the end it was not"


@pytest.mark.parametrize("left_over", [[], ["@test-noto-1.0.0.tgz"], ["noto-16.partial.npz", "tmpx1y2z3/half"]])
def test_interrupted_downloads_are_continued(tmp_path, left_over):
    (tmp_path / "packages").mkdir()
    for name in left_over:
        (tmp_path / "packages" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "packages" / name).touch()
    with folder.corpus_folder(tmp_path, {"made_by": "build_emoji"}) as complete:
        assert not complete
    with pytest.raises(ValueError, match=r"is not empty \(it holds packages\)"):
        draw_shapes(tmp_path, count=3)


# The split ---------------------------------------------------------------------------------------------------------

FIXTURES = Path(__file__).parent / "fixtures"
STYLE_SETS = st.sets(st.sampled_from(sorted(STYLES)), min_size=1).map(sorted)
NAME = st.text("abcdefgh ", min_size=1, max_size=12)


@settings(deadline=None)
@given(NAME, STYLE_SETS)
def test_held_out_pairs_leave_enough_to_train_on(name, styles):
    held_out = split.held_out_styles(name, styles, share=0.5)
    assert held_out <= set(styles)
    if held_out:
        assert len(set(styles) & set(FIRST_STYLES) - held_out) >= split.MIN_LEFT
    twins = {"fluent", "fluent flat", "fluent 3d"} & set(styles)
    assert not twins & held_out or twins <= held_out, "near twins are on the same side"


@settings(deadline=None)
@given(NAME, STYLE_SETS)
def test_styles_that_joined_later_or_on_request_move_no_picture_of_the_first_ones(name, styles):
    first = [style for style in styles if style in FIRST_STYLES]
    alone = split.held_out_styles(name, first, share=0.5)
    assert split.held_out_styles(name, styles, share=0.5) & set(FIRST_STYLES) == alone


@pytest.mark.parametrize("more", [[], ["fluent 3d"], ["streamline"], ["fluent 3d", "openmoji", "streamline"]])
def test_no_pair_that_was_held_out_becomes_a_training_pair(more):
    """Models were published with figures on these pairs."""
    lines = (FIXTURES / "split_of_version_0_1.tsv").read_text().splitlines()
    moved, held_out = [], 0
    for line in (line for line in lines if not line.startswith("#")):
        name, *numbers = line.split("\t")
        trained, tested = ([FIRST_STYLES[int(number)] for number in part] for part in numbers)
        styles = sorted([*trained, *tested], key=FIRST_STYLES.index)
        if split.held_out_styles(name, styles + more) & set(FIRST_STYLES) != set(tested):
            moved.append(name)
        held_out += len(tested)
    assert held_out == 1039 and not moved


def test_held_out_concepts_are_a_fixed_share_of_each_group():
    families = [(group, f"{group} {i}") for group in ("food", "objects", "animals") for i in range(100)]
    held_out = split.held_out_families(families)
    assert len(held_out) == 15
    assert all(sum(name.startswith(group) for name in held_out) == 5 for group in ("food", "objects", "animals"))
    assert held_out == split.held_out_families(families[::-1] + families), "order and repetition do not matter"


def test_unseen_concepts_in_known_words_are_told_apart():
    sides = {"red apple": "train", "green heart": "train", "red heart": "test_concept", "blue heart": "test_concept"}
    rows = [{"concept": name, "split": side} for name, side in sides.items()]
    assert [row["concept"] for row in split.in_known_words(rows)] == ["red heart"]


def test_the_split_never_moves():
    """Pictures on which a published model was trained must stay on their side."""
    assert split.unit_hash("pair/fox/noto") == pytest.approx(0.40170554924096485)
    written = {row["text"]: row["split"] for row in sample().rows}
    frozen = {"fox, fluent style": "test_pair", "fox, fluent flat style": "test_pair", "fox, noto style": "train",
              "sunflower, fx style": "test_pair", "sunflower, noto style": "train", "dove, noto style": "test_concept",
              "red apple, fluent style": "test_pair", "rocket, fluent style": "train"}  # fmt: skip
    assert {text: written[text] for text in frozen} == frozen
    styles = ["noto", "twemoji", "fluent", "fluent flat", "emojione", "noto blob", "fx"]
    assert split.held_out_styles("sunflower", styles) == {"fx"}


def test_the_sample_keeps_the_rules_of_the_split():
    rows = sample().rows
    side = {(row["concept"], row["style"]): row["split"] for row in rows}
    for (name, style), where in side.items():
        if style == "fluent" and (name, "fluent flat") in side:
            assert side[name, "fluent flat"] == where
    for name in {row["concept"] for row in rows}:
        sides = {row["split"] for row in rows if row["concept"] == name}
        assert sides <= {"train", "test_pair"} or sides == {"test_concept"}
    assert {row["split"] for row in rows} == {"train", "test_pair", "test_concept"}
    assert {row["style"] for row in rows if row["split"] == "train"} == {row["style"] for row in rows}


# Concepts and icons ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label, name",
    [("red apple", "red apple"), ("family: man, woman, boy", "family man woman boy"), ("T-Rex", "t-rex"),
     ("Japanese “here” button", "japanese here button"), ("woman’s hat", "woman's hat"), ("piñata", "pinata"),
     ("keycap: #", "keycap hash"), ("A button (blood type)", "a button blood type"), ("ON! arrow", "on arrow")],
)  # fmt: skip
def test_names_are_plain_text(label, name):
    assert plain(label) == name
    assert slug(name) == name.replace(" ", "-").replace("'", "")


def test_concepts_that_differ_only_in_the_person_are_one_family():
    people = "people-body"
    assert family("man astronaut", people) == family("woman astronaut", people) == family("astronaut", people)
    assert family("kiss: man, man", people) == family("kiss", people)
    assert family("cat face", "animals-nature") == family("cat", "animals-nature")
    assert family("grinning face", "smileys-emotion") != family("grinning cat", "smileys-emotion")


DATA = [
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    {"label": "red apple", "hexcode": "1F34E", "group": 4, "subgroup": 0, "tags": ["fruit"]},
    {"label": "waving hand", "hexcode": "1F44B", "group": 1, "subgroup": 1,
     "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}]},
    {"label": "eggplant", "hexcode": "1F346", "group": 4, "subgroup": 0},
    {"label": "bald", "hexcode": "1F9B2", "group": 2, "subgroup": 1},
    {"label": "heart on fire", "hexcode": "2764-FE0F-200D-1F525", "group": 4, "subgroup": 0},
    {"label": "pirate flag", "hexcode": "1F3F4", "group": 9, "subgroup": 1},
]  # fmt: skip
GROUPS = {"groups": {"1": "people-body", "2": "component", "4": "food-drink", "9": "flags"},
          "subgroups": {"0": "food-fruit", "1": "hand-fingers-open"}}  # fmt: skip


def test_the_core_has_no_flags_and_no_skin_tones_unless_asked_for():
    def names(**options):
        return [c.name for c in concepts(DATA, GROUPS, **options)]

    core = ["red apple", "waving hand", "eggplant", "heart on fire"]
    assert names() == core
    assert names(flags=True) == [*core, "pirate flag"]
    assert names(tones=True) == ["red apple", "waving hand", "waving hand dark skin tone", *core[2:]]
    toned = {c.name: c.family for c in concepts(DATA, GROUPS, tones=True)}
    assert toned["waving hand dark skin tone"] == toned["waving hand"], "so both are held out or neither"


def icons(*names: str, **aliases: str) -> dict:
    drawn = {
        name: {"body": f'<rect width="9" height="9" fill="#{zlib.crc32(name.encode()) & 0xFFFFFF:06x}"/>'}
        for name in names
    }
    return {"icons": drawn, "aliases": {a: {"parent": b} for a, b in aliases.items()}, "width": 16, "height": 16}


def test_icons_find_their_concepts_by_code_point_and_by_every_name():
    everything = concepts(DATA, GROUPS)
    by_code = join(everything, icons("a", "b"), {"2764-fe0f-200d-1f525": "a", "1f34e": "b"})
    assert by_code == {"2764-FE0F-200D-1F525": "a", "1F34E": "b"}
    assert join(everything, icons("a"), {"2764-1f525": "a"}) == {"2764-FE0F-200D-1F525": "a"}
    assert join(everything, icons("redapple"), {}) == {"1F34E": "redapple"}, "fxemoji leaves out the spaces"
    assert join(everything, icons("aubergine"), {}) == {"1F346": "aubergine"}, (
        "the code point's name, which never changes"
    )
    assert join(everything, icons("malus", **{"red-apple": "malus"}), {}) == {"1F34E": "red-apple"}


def test_the_known_traps_are_mended():
    everything = [concept("cricket", "1F997"), concept("cricket game", "1F3CF"), concept("water pistol", "1F52B"),
                  concept("cat", "1F408"), concept("cat face", "1F431"), concept("fog", "1F32B")]  # fmt: skip
    emojione = join(everything, icons("cricket-game", "pistol", cricket="cricket-game"), {}, "@iconify-json/emojione")
    assert emojione == {"1F3CF": "cricket-game", "1F52B": "pistol"}, "the alias says insect and draws the game"
    shown = emoji.as_shown(everything[2], STYLES["emojione"])
    assert shown.name == "pistol" and emoji.as_shown(everything[2], STYLES["noto"]).name == "water pistol"
    fx = join(everything, icons("cat", "catside", "fog"), {}, "@iconify-json/fxemoji")
    assert fx == {"1F408": "catside", "1F431": "cat"}, "its cat is a face, its fog is blank"


def test_of_identical_pictures_one_is_kept_and_no_blank_one():
    a, b = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    blank = np.full_like(a, 255)
    names = ["family man woman boy", "fog", "family", "astronaut", "man astronaut"]
    assert emoji.distinct(names, np.stack([a, blank, a, b, b])) == [2, 3]


def test_a_mirrored_alias_is_mirrored():
    pytest.importorskip("resvg_py")
    left = {"body": '<rect width="4" height="8"/>', "width": 8, "height": 8}
    both = {"icons": {"left": left}, "aliases": {"right": {"parent": "left", "hFlip": True}}}
    drawn = {name: emoji.render(emoji.svg(both, name), 8, 16) for name in ("left", "right")}
    assert drawn["left"][0, 0].tolist() == [0, 0, 0] and drawn["left"][0, 7].tolist() == [255, 255, 255]
    assert np.array_equal(drawn["right"], drawn["left"][:, ::-1])


# Fetching and building ----------------------------------------------------------------------------------------------


def tarball(files: dict[str, object]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pinned(npm: str, data: bytes) -> Package:
    return Package(npm, "1.0.0", base64.b64encode(hashlib.sha512(data).digest()).decode())


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A make-believe npm that brings make-believe packages: `noto` draws three concepts, `fx` two."""
    contents = {
        "names": tarball({"en/data.json": DATA, "meta/groups.json": GROUPS}),
        "noto": tarball({"icons.json": icons("x", "y", "z"), "chars.json": {"1f34e": "x", "1f44b": "y", "1f346": "z"}}),
        "fx": tarball({"icons.json": icons("not this", "redapple", "wavinghand")}),
    }
    shelf = tmp_path / "registry"
    shelf.mkdir()
    pins = {name: pinned(f"@test/{name}", data) for name, data in contents.items()}
    for name, data in contents.items():
        (shelf / pins[name].tarball).write_bytes(data)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(  # npm pack @test/noto@1.0.0 --silent
        f'#!/bin/sh\nfile=$(echo "$2" | sed "s/^@//; s/[\\/@]/-/g").tgz\ncp "{shelf}/$file" . || exit 1\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(emoji, "NAMES", pins["names"])
    for name in ("noto", "fx"):
        monkeypatch.setitem(STYLES, name, replace(STYLES[name], package=pins[name]))
    return shelf


def test_a_corpus_is_fetched_rendered_and_written(registry, tmp_path, capsys):
    pytest.importorskip("resvg_py")
    out = build_emoji(tmp_path / "corpus", size=16, styles=("fx", "noto"))
    data = CaptionedPictures(out)
    assert data.captions == ["red apple, noto style", "red apple, fx style", "waving hand, noto style",
                             "waving hand, fx style", "eggplant, noto style"]  # fmt: skip
    assert data.images.shape == (5, 16, 16, 3)
    assert data.rows[0].items() >= {"file_name": "images/noto/red-apple.png", "concept": "red apple", "style": "noto",
                                    "group": "food-drink", "subgroup": "food-fruit", "keywords": ["fruit"],
                                    "split": "train", "codepoint": "1F34E"}.items()  # fmt: skip
    assert np.array_equal(captioned_pictures.decode_file(out / "images/fx/red-apple.png"), data.images[1])
    credit = (out / "ATTRIBUTION.md").read_text()
    assert (
        "Google Inc" in credit and "Mozilla" in credit and "UNICODE LICENSE" in credit and "white background" in credit
    )
    assert data.templates == ("{}", "a {}", "the {}", "a picture of a {}")
    assert "5 pictures at 16x16" in capsys.readouterr().out


def test_a_second_run_returns_at_once_and_says_so(registry, tmp_path, capsys, monkeypatch):
    pytest.importorskip("resvg_py")
    build_emoji(tmp_path / "corpus", size=16, styles=["noto"])
    monkeypatch.setattr(emoji, "render", lambda *_: pytest.fail("it renders again"))
    (registry / emoji.NAMES.tarball).unlink()
    build_emoji(tmp_path / "corpus", size=16, styles=["noto"])
    assert "is complete" in capsys.readouterr().out


def test_a_corpus_from_before_the_templates_is_built_again(registry, tmp_path):
    pytest.importorskip("resvg_py")
    out = build_emoji(tmp_path / "corpus", size=16, styles=["noto"])
    (out / "templates.txt").unlink()
    recipe = json.loads((out / "recipe.json").read_text())
    del recipe["templates"]
    (out / "recipe.json").write_text(json.dumps(recipe))
    assert len(CaptionedPictures(build_emoji(out, size=16, styles=["noto"])).templates) == 4


def test_an_interrupted_build_keeps_what_it_has_downloaded(registry, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    render, out = emoji.render, tmp_path / "corpus"
    calls = itertools.count()

    def interrupted(*arguments):
        if next(calls) == 4:  # all is downloaded; noto's three are rendered, fx's second is not
            raise KeyboardInterrupt
        return render(*arguments)

    monkeypatch.setattr(emoji, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_emoji(out, size=16, styles=["noto", "fx"])
    assert os.listdir(out) == ["packages"], "nothing that could be taken for a corpus"
    with pytest.raises(ValueError, match="no captioned picture"):
        CaptionedPictures(out)

    for path in registry.iterdir():
        path.unlink()  # what was downloaded is kept
    drawn = []
    monkeypatch.setattr(emoji, "render", lambda *arguments: drawn.append(1) or render(*arguments))
    build_emoji(out, size=16, styles=["noto", "fx"])
    assert len(drawn) == 5
    assert len(CaptionedPictures(out)) == 5


def test_the_things_of_scenes_are_cut_out_of_the_training_pictures(registry, tmp_path, capsys):
    pytest.importorskip("resvg_py")
    corpus = build_emoji(tmp_path / "corpus", size=16, styles=("fx", "noto"))
    lines = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    lines[0]["split"] = "test_pair"
    (corpus / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = build_scenes(tmp_path / "scenes", corpus, size=16)
    things = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert sorted((thing["text"], thing["style"]) for thing in things) == [
        ("eggplant", "noto"), ("waving hand", "fx"), ("waving hand", "noto"),
    ]  # fmt: skip  # "red apple" has a colour in its name
    assert np.load(out / "pictures.npy").shape == (3, 16, 16, 4)
    assert "Google Inc" in (out / "ATTRIBUTION.md").read_text()
    capsys.readouterr()
    build_scenes(tmp_path / "scenes", corpus, size=16)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is no corpus of `minisd data emoji`"):
        build_scenes(tmp_path / "more", tmp_path)


def test_another_recipe_replaces_the_corpus(registry, tmp_path):
    pytest.importorskip("resvg_py")
    build_emoji(tmp_path / "corpus", size=16, styles=["noto", "fx"])
    build_emoji(tmp_path / "corpus", size=24, styles=["noto"])
    assert CaptionedPictures(tmp_path / "corpus").images.shape == (3, 24, 24, 3)
    assert os.listdir(tmp_path / "corpus" / "images") == ["noto"]


def test_a_package_that_is_not_the_pinned_one_is_refused(registry, tmp_path):
    package = emoji.NAMES
    (registry / package.tarball).write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not @test/names 1.0.0"):
        packages.fetch(package, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []
    (tmp_path / "cache" / package.tarball).write_bytes(b"damaged on the disk")
    with pytest.raises(ValueError, match="delete it and run again"):
        packages.fetch(package, tmp_path / "cache")


def test_every_package_is_pinned_and_every_style_that_another_names_exists():
    for package in (emoji.NAMES, *(style.package for style in STYLES.values())):
        assert len(base64.b64decode(package.sha512, validate=True)) == 64, package.npm
        assert re.fullmatch(r"\d+\.\d+\.\d+", package.version)
    assert all(style.on_request == ("SA" in style.licence) for style in STYLES.values())
    named = {name for style in STYLES.values() for name in (style.twin_of, style.codepoints_of) if name}
    assert named <= STYLES.keys() and split.TWINS == {"fluent flat": "fluent", "fluent 3d": "fluent"}


def test_a_failing_network_is_one_clear_sentence(registry, tmp_path):
    (registry / emoji.NAMES.tarball).unlink()
    with pytest.raises(ConnectionError, match="npm could not bring @test/names 1.0.0 .*check the network"):
        packages.fetch(emoji.NAMES, tmp_path / "cache")


def test_without_npm_what_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm, which brings .* is not installed: install Node.js"):
        packages.fetch(emoji.NAMES, tmp_path / "cache")


def test_without_resvg_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "minisd\[data\]"'):
        build_emoji(tmp_path)


@pytest.mark.parametrize(
    "options, sentence",
    [({"styles": ["picasso"]}, "No such style: picasso; there are: noto"), ({"styles": []}, "No such style: none"),
     ({"size": 8}, "from 16 to 512")],
)  # fmt: skip
def test_wrong_arguments_are_one_clear_sentence(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_emoji(tmp_path, **options)
    assert os.listdir(tmp_path) == []


# The sample --------------------------------------------------------------------------------------------------------


def test_the_sample_is_readable_small_and_free_of_share_alike():
    data = sample()
    assert data.images.shape == (len(data), 64, 64, 3)
    assert sample(size=32).batch(range(4)).shape == (4, 3, 32, 32)
    assert {STYLES[row["style"]].licence for row in data.rows} == {"Apache-2.0", "MIT"}
    concepts = {row["concept"] for row in data.rows}
    assert data.templates == emoji.TEMPLATES
    assert {"fox", "cat", "red apple", "grinning face", "rocket", "sunflower"} <= concepts
    assert len({p.tobytes() for p in data.images}) == len(data), "no picture twice"
    assert data.images.min(axis=(1, 2, 3)).max() < 255, "and none blank"

    assert sum(file.stat().st_size for file in data.folder.iterdir()) <= 3_000_000
    notice = (data.folder / "NOTICE.md").read_text()
    assert notice == cut_sample.notice()
    assert all(STYLES[row["style"]].title in notice for row in data.rows)
    assert "UNICODE LICENSE" in notice and "Microsoft Corporation" in notice
    assert (data.folder / "LICENSE-APACHE-2.0.txt").read_text().lstrip().startswith("Apache License")


def test_the_photograph_is_one_and_says_whose_it_is():
    x = photograph()
    assert x.shape == (1, 3, 128, 128) and x.dtype == torch.float32
    assert -1 <= x.min() < -0.8 and 0.5 < x.max() <= 1, "in [-1, 1], and from dark to light"
    torch.testing.assert_close(photograph(32), torch.nn.functional.avg_pool2d(x, 4), atol=0.005, rtol=0)
    # A drawing is mostly flat; in a photograph hardly any two neighbours are equal.
    flat = {name: (p[..., 1:] == p[..., :-1]).all(1).float().mean() for name, p in
            {"photograph": x, "drawings": sample().batch(range(20))}.items()}  # fmt: skip
    assert flat["photograph"] < 0.1 < 0.4 < flat["drawings"]
    file = sample_pictures.SAMPLE / "photograph.webp"
    assert file.stat().st_size <= 20_000
    assert "Stefan van der Walt" in (file.parent / "NOTICE.md").read_text()


def test_a_sheet_gives_back_its_pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    cut_sample.write_sheet(tmp_path / "sheet.webp", noise)
    assert np.array_equal(captioned_pictures.read_sheet(tmp_path / "sheet.webp", 40), noise)


# Shapes ------------------------------------------------------------------------------------------------------------

SCENES = [shapes.scene(0, k) for k in range(600)]


def test_shapes_are_a_function_of_seed_and_number():
    images, captions = shape_corpus(12, size=32, seed=3)
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    again, same = shape_corpus(5, size=32, seed=3)
    assert np.array_equal(again, images[:5]) and same == captions[:5], "a longer corpus begins with the shorter one"
    assert shape_corpus(12, seed=4)[1] != captions


def areas(image: np.ndarray) -> int:
    """How many separate things are drawn: a flood fill of what is not white."""
    ink = {(int(y), int(x)) for y, x in np.argwhere((image < 250).any(-1))}
    count = 0
    while ink:
        count, front = count + 1, [ink.pop()]
        while front:
            y, x = front.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & ink
            ink -= near
            front += near
    return count


def test_a_caption_says_what_is_drawn():
    for scene in SCENES[:200]:
        image = shapes.render(scene, 48)
        assert areas(image) == len(scene.items), scene.caption
        for item in scene.items:
            assert tuple(image[int(48 * item.y), int(48 * item.x)]) == shapes.COLOURS[item.colour], scene.caption
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == 255).all(), f"{scene.caption}: cut off at the edge"


def test_counts_places_and_relations_are_true():
    for scene in SCENES:
        words, first = scene.caption.split(), scene.items[0]
        assert first.colour in words and first.shape in scene.caption
        if scene.kind == "count":
            assert len(scene.items) == {"two": 2, "three": 3, "four": 4}[words[0]]
            assert len({item.name for item in scene.items}) == 1 and words[2] == first.shape + "s"
        if scene.kind == "place":
            assert ("left" in words) == (first.x < 0.4) and ("right" in words) == (first.x > 0.6)
            assert ("top" in words) == (first.y < 0.4) and ("bottom" in words) == (first.y > 0.6)
        if scene.kind == "relation":
            second = scene.items[1]
            assert scene.caption.endswith(shapes.with_article(second.name)) and second.name != first.name
            true = {"above": first.y < second.y, "below": first.y > second.y, "left": first.x < second.x,
                    "right": first.x > second.x}  # fmt: skip
            assert true[next(word for word in words if word in true)]
    assert {scene.kind for scene in SCENES} == {"size", "place", "count", "relation"}
    sizes = {word: [s.items[0].radius for s in SCENES if word in s.caption] for word in ("small", "large")}
    assert max(sizes["small"]) < 0.15 < 0.3 < min(sizes["large"])


def test_held_out_shapes_never_occur_in_training():
    train = [scene for scene in SCENES if scene.split == "train"]
    seen = {item.name for scene in train for item in scene.items}
    assert len(shapes.HELD_OUT) == len(shapes.SHAPES) and not seen & shapes.HELD_OUT
    assert {name.split()[0] for name in seen} == set(shapes.COLOURS)
    assert {name.split()[1] for name in seen} == set(shapes.SHAPES)
    assert all(any(item.name in shapes.HELD_OUT for item in s.items) for s in SCENES if s.split == "test_pair")


def test_shapes_are_written_as_a_corpus(tmp_path, capsys):
    out = draw_shapes(tmp_path / "shapes", count=40, size=16, seed=1)
    data = CaptionedPictures(out)
    images, captions = shape_corpus(40, size=16, seed=1)
    assert data.captions == captions and np.array_equal(data.images, images)
    assert {row["split"] for row in data.rows} == {"train", "test_pair"}
    assert data.templates == ("{}",), 'its captions are whole phrases: "a picture of a two pink diamonds" is none'
    written = (out / "pictures.npy").stat().st_mtime_ns
    draw_shapes(out, count=40, size=16, seed=1)
    assert "is complete" in capsys.readouterr().out
    assert (out / "pictures.npy").stat().st_mtime_ns == written


def test_wrong_shapes_are_one_clear_sentence():
    with pytest.raises(ValueError, match="1 to 1,000,000 can be drawn"):
        shape_corpus(0)
    with pytest.raises(ValueError, match="no shape that can be drawn"):
        shapes.outline("hexagon")


# -- data sets of the hub -------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    """A data set as the hub holds it: pictures of several modes, one broken, one without a caption."""
    from datasets import Dataset
    from datasets import Image as Column

    red, clear = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(red, "JPEG", quality=100)
    Image.new("LA", (10, 10), (0, 0)).save(clear, "PNG")
    pictures = [red.getvalue(), clear.getvalue(), b"no picture", red.getvalue(), None]
    captions = [["a red field", "another caption"], ["nothing"], ["broken"], [" "], ["none"]]
    rows = {"picture": [{"bytes": data, "path": None} for data in pictures], "captions": captions}
    Dataset.from_dict(rows).cast_column("picture", Column(decode=False)).cast_column("picture", Column()).to_parquet(
        tmp_path / "set" / "data.parquet"
    )
    return tmp_path / "set"


def test_a_data_set_becomes_a_folder_of_captioned_pictures(parquet, tmp_path, capsys):
    from minisd.data import CaptionedPictures, fetch_dataset

    columns = {"image": "picture", "text": "captions", "size": 8}
    folder = fetch_dataset(parquet, tmp_path / "out", **columns)
    assert "2 pictures at 8x8; 3 rows left out" in capsys.readouterr().out
    data = CaptionedPictures(folder)
    assert data.captions == ["a red field", "nothing"] and not data.skipped
    red, white = data.batch([0, 1])
    assert red[0].min() > 0.95 and red[1:].max() < -0.95 and (white == 1).all()
    fetch_dataset(parquet, tmp_path / "out", **columns)
    assert "already" in capsys.readouterr().out
    assert len(CaptionedPictures(fetch_dataset(parquet, tmp_path / "one", **columns, count=1))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "no split test"),
        ({"image": "picture"}, "no column text, but picture, captions"),
        ({"image": "captions", "text": "picture"}, "captions of .* holds no pictures"),
        ({"source": "nowhere"}, "no data set at .*nowhere"),
    ],
)
def test_a_data_set_that_is_not_as_asked_for_is_one_clear_sentence(parquet, tmp_path, options, words):
    from minisd.data import fetch_dataset

    source = parquet.parent / options.pop("source", "set")
    with pytest.raises(ValueError, match=words):
        fetch_dataset(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
