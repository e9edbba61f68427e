"""CLIP: both towers, and the embedder, equal those of transformers."""

import math
import re
import warnings
from dataclasses import asdict

import pytest
import torch

from minisd.clip import (
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
