"""CLIP: both towers against transformers, the tokenizer against transformers token for token."""

import math
import re
import warnings
from dataclasses import asdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minisd.clip import (
    BPETokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    FrozenCLIPEmbedder,
    contrastive_loss,
)

LENGTH = 16
END = 1
TEXT = CLIPTextConfig(vocab_size=700, max_length=LENGTH, width=48, layers=2, heads=3, projection_dim=24)
VISION = CLIPVisionConfig(image_size=32, patch_size=8, width=64, layers=2, heads=2, projection_dim=24)

# Any Unicode text, and text of the words that the tokenizer was trained on
WORDS = ["a", "red", "fox", "Blue", "circle,", "it's", "10", "noto-style!", "naïve", "🦊", "日本", "e\u0301", "\t"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join),
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the towers, against transformers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_config(transformers):
    return transformers.CLIPTextConfig(
        vocab_size=TEXT.vocab_size, max_position_embeddings=LENGTH, hidden_size=TEXT.width, projection_dim=24,
        intermediate_size=4 * TEXT.width, num_hidden_layers=TEXT.layers, num_attention_heads=TEXT.heads,
        bos_token_id=0, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip


@pytest.fixture(scope="module")
def clip(randomise):
    model = randomise(CLIPModel(TEXT, VISION, end_token=END))
    torch.nn.init.constant_(model.logit_scale, 1.5)
    return model


@pytest.fixture(scope="module")
def theirs(transformers, text_config, clip):
    """transformers' CLIPModel with our weights: all names are the same."""
    vision = transformers.CLIPVisionConfig(
        image_size=VISION.image_size, patch_size=VISION.patch_size, hidden_size=VISION.width, projection_dim=24,
        intermediate_size=4 * VISION.width, num_hidden_layers=VISION.layers, num_attention_heads=VISION.heads,
    )  # fmt: skip
    config = transformers.CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    state = model.state_dict()
    assert clip.state_dict().keys() == {name for name in state if not name.endswith("position_ids")}
    model.load_state_dict(clip.state_dict(), strict=not any(name.endswith("position_ids") for name in state))
    return model


@pytest.fixture(scope="module")
def batch():
    """Four sentences of different lengths, padded by end tokens, and four pictures."""
    ids = torch.randint(2, TEXT.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    for row, length in zip(ids, (1, 5, 9, LENGTH - 1), strict=True):
        row[length:] = END
    return ids, draw(1, 4, 3, 32, 32).clamp(-1, 1)


@torch.no_grad()
def test_the_last_hidden_state_equals_transformers(transformers, text_config, clip, batch):
    """That of CLIPTextModel, which is what Stable Diffusion reads: after the final norm."""
    reference = transformers.CLIPTextModel(text_config).eval()
    tower = getattr(reference, "text_model", reference)  # transformers 5 has dropped that prefix
    tower.load_state_dict(clip.text_model.state_dict())
    ours = CLIPTextModel(TEXT)
    ours.text_model.load_state_dict(clip.text_model.state_dict())
    for ids in (batch[0], batch[0][:, :7]):  # a whole context, and a shorter one
        expected = reference(input_ids=ids).last_hidden_state
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(ids), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_features_logits_and_loss_equal_transformers(clip, theirs, batch):
    ids, pixels = batch
    expected = theirs(input_ids=ids, pixel_values=pixels, return_loss=True)
    torch.testing.assert_close(clip.get_text_features(ids), expected.text_embeds, atol=2e-5, rtol=0)
    torch.testing.assert_close(clip.get_image_features(pixels), expected.image_embeds, atol=2e-5, rtol=0)
    logits = clip(ids, pixels)
    assert logits.std() > 0.1 and not torch.allclose(logits, logits.T, atol=0.1)
    torch.testing.assert_close(logits, expected.logits_per_image, atol=2e-5, rtol=0)
    torch.testing.assert_close(contrastive_loss(logits), expected.loss, atol=2e-5, rtol=0)


def test_gradients_equal_transformers(clip, theirs, batch):
    ids, pixels = batch
    ours = torch.autograd.grad(contrastive_loss(clip(ids, pixels)), clip.parameters())
    parameters = dict(theirs.named_parameters())
    loss = theirs(input_ids=ids, pixel_values=pixels, return_loss=True).loss
    expected = torch.autograd.grad(loss, [parameters[name] for name, _ in clip.named_parameters()])
    for (name, _), a, b in zip(clip.named_parameters(), ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_stable_diffusion_v1_has_a_text_tower_of_123_million_parameters():
    with torch.device("meta"):
        tower = CLIPTextModel()
    assert sum(p.numel() for p in tower.parameters()) == 123_060_480


# -- the towers, by themselves -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(clip, batch):
    ids = batch[0]
    before = clip.text_model(ids)
    for i in (1, 6, LENGTH - 1):
        changed = ids.clone()
        changed[:, i] = 321
        after = clip.text_model(changed)
        assert torch.equal(after[:, :i], before[:, :i])
        assert (after[:, i:] - before[:, i:]).abs().amax(dim=-1).min() > 1e-3


@torch.no_grad()
def test_a_sentence_is_read_off_at_its_first_end_token(clip, batch):
    """So what stands behind it does not count, and what stands before it does."""
    ids = batch[0][1:3].clone()  # ends at 5 and 9
    before = clip.get_text_features(ids)
    ids[:, 12] = 99
    assert torch.equal(clip.get_text_features(ids), before)
    ids[:, 3] = 99
    assert (clip.get_text_features(ids) - before).abs().amax(dim=1).min() > 1e-3


@torch.no_grad()
def test_features_are_unit_vectors_and_the_temperature_is_bounded(clip, batch):
    ids, pixels = batch
    for features in (clip.get_text_features(ids), clip.get_image_features(pixels)):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)
    fresh = CLIPModel(TEXT, VISION, END)
    assert math.exp(fresh.logit_scale) == pytest.approx(1 / 0.07)
    cosines = fresh.get_image_features(pixels) @ fresh.get_text_features(ids).T
    torch.nn.init.constant_(fresh.logit_scale, 20.0)
    torch.testing.assert_close(fresh(ids, pixels), 100 * cosines, atol=1e-4, rtol=0)


def test_the_contrastive_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]  # picture → caption
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]  # caption → picture
    assert contrastive_loss(logits).item() == pytest.approx((sum(rows) / 2 + sum(columns) / 2) / 2, abs=1e-6)
    assert contrastive_loss(torch.zeros(5, 5)).item() == pytest.approx(math.log(5), abs=1e-6)
    assert contrastive_loss(100 * torch.eye(5)).item() == pytest.approx(0, abs=1e-6)


def test_a_new_model_starts_from_openais_deviations():
    torch.manual_seed(0)
    clip = CLIPModel(TEXT, VISION, END)
    layer = clip.vision_model.encoder.layers[1]
    expected = {
        clip.text_model.embeddings.token_embedding.weight: 0.02,
        clip.text_model.embeddings.position_embedding.weight: 0.01,
        clip.vision_model.embeddings.position_embedding.weight: 64**-0.5,
        layer.self_attn.q_proj.weight: 64**-0.5,
        layer.self_attn.out_proj.weight: 64**-0.5 * (2 * 2) ** -0.5,
        layer.mlp.fc1.weight: (2 * 64) ** -0.5,
        layer.mlp.fc2.weight: 64**-0.5 * (2 * 2) ** -0.5,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_towers_that_share_no_space_are_refused():
    with pytest.raises(ValueError, match="share one space: 24 != 32"):
        CLIPModel(TEXT, CLIPVisionConfig(**{**asdict(VISION), "projection_dim": 32}), END)


# -- the tokenizer -------------------------------------------------------------------------------------------------


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


def test_training_twice_gives_the_same_tokenizer(captions, tokenizer):
    again = BPETokenizer.train(captions, vocab_size=640)
    assert again.vocab == tokenizer.vocab and again.merges == tokenizer.merges


# -- the embedder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(randomise, tokenizer):
    return FrozenCLIPEmbedder(randomise(CLIPTextModel(TEXT), seed=3), tokenizer, LENGTH)


def test_the_embedder_gives_the_whole_last_hidden_state(embedder, tokenizer, captions):
    context = embedder(captions[:2])
    assert context.shape == (2, LENGTH, TEXT.width)
    assert torch.equal(context, embedder.transformer(tokenizer(captions[:2], LENGTH).ids))
    assert torch.equal(context, embedder.encode(captions[:2]))


def test_the_embedder_is_frozen(randomise, tokenizer):
    tower = randomise(CLIPTextModel(TEXT)).train()
    embedder = FrozenCLIPEmbedder(tower, tokenizer, LENGTH)
    assert not any(module.training for module in embedder.modules())
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    with torch.enable_grad():
        assert not embedder(["a red fox"]).requires_grad


def test_a_prompt_too_long_is_cut_with_a_warning_that_names_what_was_lost(embedder):
    long = "a red fox " * 5
    with pytest.warns(UserWarning, match=f"longer than {LENGTH} tokens") as caught:
        ids = embedder.tokenize(["a cat", long, "a fox"])
    assert ids.shape == (3, LENGTH)
    assert len(caught) == 1 and repr("fox ") in str(caught[0].message) and repr(long) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.tokenize(["a red fox " * 4, ""])


def test_the_embedder_of_transformers_gives_the_same(transformers, text_config, embedder, tmp_path):
    """Our weights and our tokenizer, saved and opened by transformers: context, cut prompts and all."""
    model = transformers.CLIPTextModel(text_config)
    getattr(model, "text_model", model).load_state_dict(embedder.transformer.text_model.state_dict())
    model.save_pretrained(tmp_path)
    embedder.tokenizer.save(tmp_path, LENGTH)
    theirs = FrozenCLIPEmbedder.from_transformers(str(tmp_path), LENGTH)

    prompts = ["", "a red fox, noto style", "Curaçao 🦊", "two green squares " * 6]
    with pytest.warns(UserWarning, match=re.escape(repr("squares two green squares "))):
        ours = embedder(prompts)
    with pytest.warns(UserWarning, match=re.escape("cut off: 'squares two green squares'")):
        expected = theirs(prompts)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    assert theirs.tokenizer.end_token == embedder.tokenizer.end_token
    assert not any(parameter.requires_grad for parameter in theirs.parameters())
    assert not any(module.training for module in theirs.modules())
