"""Damaged files: each loads, or is refused in one sentence. `python -m tests.fuzz 10000` runs many more."""

from collections import Counter

import fuzz
import pytest
from PIL import Image


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_damaged_file_is_refused_in_a_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", fuzz.MOST_PIXELS)
    (tmp_path / "files").mkdir()
    fuzz.prepare(kind, tmp_path / "files")
    found = {number: fuzz.damaged_and_read(kind, number, tmp_path / "files") for number in range(100)}
    faults = {number: said for number, (what, said) in found.items() if what in fuzz.FAULTS}
    assert not faults, "\n".join(f"python -m tests.fuzz 1 --kind '{kind}' --first {n}: {s}" for n, s in faults.items())
    counts = Counter(what for what, _ in found.values())
    assert counts["refused"] > 15 or counts["loaded"] > 15 and kind.endswith((".txt", ".csv"))  # the damage is damage
