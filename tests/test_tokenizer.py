"""The tokenizer: equal to transformers' token for token, whatever the text, and the same after saving."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minisd.tokenizer import BPETokenizer, Tokenizer

LENGTH = 16

# Any Unicode text, and text of the words that the tokenizer was trained on
WORDS = ["a", "red", "fox", "Blue", "circle,", "it's", "10", "noto-style!", "naïve", "🦊", "日本", "e\u0301", "\t"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join),
)


@pytest.fixture(scope="module")
def reference(transformers, tokenizer, tmp_path_factory):
    """transformers' CLIPTokenizer, from the folder that ours was saved into."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder, max_length=LENGTH)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def words_of(tokenizer, text: str) -> list[int]:
    """The ids of a text, without the start token and the end tokens around it."""
    ids = tokenizer([text], 4096).ids[0].tolist()
    assert ids[0] == tokenizer.start_token and set(ids[ids.index(tokenizer.end_token) :]) == {tokenizer.end_token}
    return ids[1 : ids.index(tokenizer.end_token)]


def spell(tokenizer, ids: list[int]) -> str:
    """The text that ids stand for, without its spaces."""
    from tokenizers.decoders import ByteLevel

    return ByteLevel().decode([piece.removesuffix("</w>") for piece in tokenizer.pieces(ids)])


@settings(max_examples=200, deadline=None)
@given(text=texts)
@example("")
@example("It's a RED fox; we'LL see 1,234 of them_")
@example("Σίσυφος İstanbul ǅ ﬁ e\u0301 \u1e9b\u0323")
@example("tab\there\u2028and\u00a0there\x85\x00\x1c 👩\u200d🚀")
@example("a fox<|endoftext|><|startoftext|> a <|ENDOFTEXT|> b")
def test_ids_equal_transformers_token_for_token(tokenizer, reference, text):
    ours = tokenizer([text], LENGTH).ids
    expected = reference([text], padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    assert ours.tolist() == expected
    assert ours.dtype == torch.int64 and ours.shape == (1, LENGTH)


@pytest.fixture(scope="module")
def clips_own(transformers, tmp_path_factory):
    """CLIP's vocabulary, and transformers' CLIPTokenizer with it."""
    tokenizer, folder = BPETokenizer.clip(), tmp_path_factory.mktemp("clip")
    tokenizer.save(folder, max_length=77)
    return tokenizer, transformers.CLIPTokenizer.from_pretrained(folder)


def test_clips_vocabulary_has_its_49408_entries_in_their_places(clips_own):
    tokenizer, _ = clips_own
    assert sorted(tokenizer.vocab.values()) == list(range(49408))
    places = {"!": 0, "a</w>": 320, "the</w>": 518, "</w>": None, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {piece: tokenizer.vocab.get(piece) for piece in places} == places


@settings(max_examples=200, deadline=None)
@given(text=texts)
@example("a photograph of an astronaut riding a horse, highly detailed, artstation, 8k")
@example("It's a RED fox; we'LL see 1,234 of them_ \u00e9 e\u0301 <|endoftext|> 👩\u200d🚀")
def test_ids_of_clips_vocabulary_equal_transformers(clips_own, text):
    tokenizer, theirs = clips_own
    expected = theirs([text], padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert tokenizer([text], 77).ids.tolist() == expected


def test_another_padding_token_is_kept(tokenizer, transformers, tmp_path):
    """Stable Diffusion 2 pads with "!"."""
    other = BPETokenizer(tokenizer.vocab, tokenizer.merges, pad="!")
    other.save(tmp_path, max_length=LENGTH)
    assert BPETokenizer.load(tmp_path)(["a fox"], LENGTH).ids.tolist() == other(["a fox"], LENGTH).ids.tolist()
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = theirs(["a fox"], padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    assert other(["a fox"], LENGTH).ids.tolist() == expected


def test_a_tokenizer_saved_by_transformers_5_is_read(tokenizer, reference, tmp_path):
    """It writes one file, tokenizer.json."""
    reference.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    again = BPETokenizer.load(tmp_path)
    assert again.vocab == tokenizer.vocab and again.merges == tokenizer.merges


@settings(max_examples=200, deadline=None)
@given(text=texts)
@example("".join(map(chr, range(0x500))))
def test_any_text_can_be_written_and_read_back(tokenizer, text):
    """All 256 bytes are in the vocabulary, in a word and at its end: no sign is unknown."""
    written = spell(tokenizer, words_of(tokenizer, text))
    assert written == tokenizer.engine.normalizer.normalize_str(text).replace(" ", "")


def test_words_of_the_captions_are_single_tokens(tokenizer):
    assert tokenizer.pieces(words_of(tokenizer, "A  Red fox, noto STYLE")) == [
        "a</w>", "red</w>", "fox</w>", ",</w>", "noto</w>", "style</w>",
    ]  # fmt: skip


def test_the_empty_prompt_is_a_start_and_ends(tokenizer):
    start, end = tokenizer.start_token, tokenizer.end_token
    assert tokenizer([""], 5).ids.tolist() == [[start, end, end, end, end]]
    assert tokenizer.pieces([start, end]) == ["<|startoftext|>", "<|endoftext|>"]


def test_a_prompt_that_just_fits_loses_nothing(tokenizer):
    assert tokenizer(["a red fox"], 5).lost == [""]
    assert tokenizer(["a red fox"], 4).lost == ["fox"]
    assert tokenizer.pieces(tokenizer(["a red fox"], 4).ids[0].tolist())[1:-1] == ["a</w>", "red</w>"]


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["a", "Red", "fox", "foxes,", "Squares", "10", "ox!"]), max_size=20))
def test_what_is_kept_and_what_is_lost_make_the_whole(tokenizer, words):
    prompt = "  ".join(words)
    ids, (lost,) = tokenizer([prompt], LENGTH)
    kept = [i for i in ids[0].tolist() if i not in (tokenizer.start_token, tokenizer.end_token)]
    assert prompt.endswith(lost) and bool(lost) == (len(words_of(tokenizer, prompt)) > LENGTH - 2)
    assert ids[0, 0] == tokenizer.start_token and ids[0, -1] == tokenizer.end_token
    assert spell(tokenizer, kept) + lost.replace(" ", "").lower() == prompt.replace(" ", "").lower()


def test_what_is_lost_is_named_in_the_words_of_the_prompt(tokenizer):
    """Its accents and capitals too, though the tokens know neither, and a sign of many bytes as a whole."""
    prompts = ["a red FOX and e\u0301 İI Naïve 🦊", "a fox"]
    found = [tokenizer(prompts, length).lost for length in (5, 3)]
    assert found == [["and e\u0301 İI Naïve 🦊", ""], ["red FOX and e\u0301 İI Naïve 🦊", "fox"]]
    assert tokenizer(["a 🦊 🦊"], 8).lost == ["🦊"]  # 4 bytes each: the first fits, half of the second does not


def test_a_saved_tokenizer_is_the_same(tokenizer, captions, tmp_path):
    tokenizer.save(tmp_path, max_length=LENGTH)
    again = BPETokenizer.load(tmp_path)
    assert again.vocab == tokenizer.vocab and again.merges == tokenizer.merges
    assert torch.equal(again(captions, 40).ids, tokenizer(captions, 40).ids)


@pytest.mark.parametrize("size", [514, 560, 1024])
def test_the_vocabulary_is_no_larger_than_it_was_asked_to_be(captions, size):
    tokenizer = BPETokenizer.train(captions, vocab_size=size)
    assert sorted(tokenizer.vocab.values()) == list(range(len(tokenizer.vocab)))
    assert len(tokenizer.vocab) <= size
    assert (tokenizer.start_token, tokenizer.end_token) == (0, 1)


def test_a_vocabulary_too_small_for_the_bytes_is_refused(captions):
    with pytest.raises(ValueError, match="at least 514"):
        BPETokenizer.train(captions, vocab_size=513)


@pytest.mark.parametrize("files, message", [
    ({}, "neither vocab.json and merges.txt nor tokenizer.json"),
    ({"vocab.json": "{}"}, "neither vocab.json and merges.txt nor tokenizer.json"),
    ({"vocab.json": "{}", "merges.txt": ""}, "no <|startoftext|> and no <|endoftext|>"),
    ({"vocab.json": "{", "merges.txt": ""}, "can't be used"),
    ({"tokenizer.json": '{"model": {"type": "WordPiece"}}'}, "its model is WordPiece, not BPE"),
    ({"vocab.json": '{"<|startoftext|>": 0, "<|endoftext|>": 1}', "merges.txt": "a b"}, "merges do not fit"),
])  # fmt: skip
def test_a_folder_without_a_usable_tokenizer_is_refused_with_the_reason(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)) as refused:
        BPETokenizer.load(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_the_bytes_are_written_as_the_library_writes_them(tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pieces = tokenizer.pieces(list(range(2, 514)))
    assert pieces == alphabet + [byte + "</w>" for byte in alphabet]
    assert list(BPETokenizer.clip().vocab)[:512] == pieces


def test_it_is_a_tokenizer_and_can_be_had_from_clip_too(tokenizer):
    import minisd

    assert isinstance(tokenizer, Tokenizer)
    assert minisd.BPETokenizer is minisd.clip.BPETokenizer is BPETokenizer


def test_training_twice_gives_the_same_tokenizer(captions, tokenizer):
    again = BPETokenizer.train(captions, vocab_size=640)
    assert again.vocab == tokenizer.vocab and again.merges == tokenizer.merges


# -- words that were added later ---------------------------------------------------------------------------------------


def test_an_added_word_stays_whole_as_in_transformers(tokenizer, transformers, tmp_path):
    """As textual inversion adds it. transformers writes it into tokenizer.json, or, earlier, into added_tokens.json."""
    tokenizer.save(tmp_path / "plain", 77)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "plain")
    theirs.add_tokens(["<cat>", "<my-style>"])
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "old", 77)
    number = len(tokenizer.vocab)
    (tmp_path / "old" / "added_tokens.json").write_text(f'{{"<cat>": {number}, "<my-style>": {number + 1}}}')

    texts = ["a <cat>", "<cat>s in <my-style>!", "a cat"]
    expected = theirs(texts, padding="max_length", max_length=16, truncation=True)["input_ids"]
    for folder in ("theirs", "old"):
        ours = BPETokenizer.load(tmp_path / folder)
        assert ours(texts, 16).ids.tolist() == expected
        ours.save(tmp_path / f"{folder} again", 77)
        assert BPETokenizer.load(tmp_path / f"{folder} again")(texts, 16).ids.tolist() == expected
        again = transformers.CLIPTokenizer.from_pretrained(tmp_path / f"{folder} again")
        assert again(texts, padding="max_length", max_length=16, truncation=True)["input_ids"] == expected
