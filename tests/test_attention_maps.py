"""Recording changes nothing that is drawn, and leaves nothing behind."""

import copy
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from minisd.attention import CrossAttention
from minisd.instruments.attention_maps import record_attention

PROMPT = "a red fox, noto style"
OPTIONS = {"steps": 3, "guidance_scale": 3.0, "seed": 1}


def untouched(sd) -> bool:
    modules = list(sd.modules())
    layers = [module for module in modules if isinstance(module, CrossAttention)]
    hooks = [nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks]
    hooks += [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    return all(layer.record is None for layer in layers) and not any(hooks)


@pytest.fixture(scope="module")
def drawn(sd):
    with record_attention(sd, self_attention=True, by_head=True) as maps:
        drawing = sd.txt2img(PROMPT, num_images=2, **OPTIONS)
    return maps, drawing


def test_the_picture_is_the_same(sd, drawn):
    torch.testing.assert_close(drawn[1].pictures, sd.txt2img(PROMPT, num_images=2, **OPTIONS).pictures)
    assert untouched(sd)


def test_the_maps_are_those_of_the_layer(sd, drawn):
    """Written out from what the layer was given, in a call of its own."""
    maps, drawing = drawn
    name = maps.layers[-1]
    layer = sd.model.diffusion_model.get_submodule(name)
    given = []
    hook = layer.register_forward_pre_hook(lambda _, args: given.append(args))
    context = sd.get_learned_conditioning([PROMPT, PROMPT])
    t = drawing.trajectory[1].t
    with torch.no_grad():
        sd.apply_model(drawing.trajectory[1].x_t, torch.tensor([t, t]), context)
    hook.remove()
    x, context = given[0]
    q, k = (p(a).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p, a in ((layer.to_q, x), (layer.to_k, context)))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # [2 heads n m]
    torch.testing.assert_close(maps.raw(1, name), weights)  # of the prompt, not of the empty one beside it
    expected = weights[1].mean(0).T.unflatten(1, (4, 4))
    torch.testing.assert_close(maps.at(step=1, layer=name, picture=1), expected)
    torch.testing.assert_close(maps.at(step=1, layer=name, picture=1, head=0), weights[1, 0].T.unflatten(1, (4, 4)))


def test_the_weights_of_a_pixel_sum_to_one(drawn):
    maps, _ = drawn
    assert len(maps.timesteps) == 3 and maps.guided
    assert sum(name.endswith("attn1") for name in maps.layers) == sum(name.endswith("attn2") for name in maps.layers)
    for step in range(3):
        for layer in maps.layers:
            weights = maps.raw(step, layer)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for options in ({}, {"step": 0}, {"layer": "middle_block"}, {"size": (8, 8)}, {"head": 1}):
        m = maps.at(**options)
        torch.testing.assert_close(m.sum(0), torch.ones(m.shape[1:]))
    steps = torch.stack([maps.at(step=step) for step in range(3)])
    torch.testing.assert_close(steps.mean(0), maps.at())


def test_words_are_found_in_the_prompt(drawn, sd):
    maps, _ = drawn
    tokens, everything = maps.tokens, maps.at()
    assert tokens[0] == "<start>" and "".join(tokens[1 : tokens.index("<end>")]) == "aredfox,notostyle"
    assert set(tokens[tokens.index("<end>") + 1 :]) == {"<pad>"} and len(tokens) == len(everything) == 16
    torch.testing.assert_close(maps.at(token=0), everything[0])
    torch.testing.assert_close(maps.at(token="<pad>"), everything[tokens.index("<pad>") :].sum(0))
    with record_attention(sd) as split:
        sd.txt2img("unfoxed red", **OPTIONS)  # no word of the captions: it falls into pieces
    pieces = split.tokens[1 : split.tokens.index("red")]
    assert len(pieces) > 1 and "".join(pieces) == "unfoxed"
    torch.testing.assert_close(split.at(token="unfoxed"), split.at()[1 : 1 + len(pieces)].sum(0))


def test_it_is_removed_after_an_error_too(sd):
    with pytest.raises(KeyboardInterrupt), record_attention(sd):
        for _ in sd.sample(PROMPT, **OPTIONS):
            raise KeyboardInterrupt
    assert untouched(sd)


def test_one_within_another_and_one_after_another(sd):
    with record_attention(sd) as outer:
        with record_attention(sd) as inner:
            sd.txt2img(PROMPT, **OPTIONS)
        torch.testing.assert_close(inner.at(), outer.at())
        kept = inner.at()
        sd.txt2img("a smiling cat", **OPTIONS)  # takes the place of the first, and the inner one is no longer there
    assert "cat" in outer.tokens and len(outer.timesteps) == 3 and "fox" in inner.tokens
    torch.testing.assert_close(inner.at(), kept)
    with record_attention(sd) as again:
        sd.txt2img(PROMPT, **OPTIONS)
    torch.testing.assert_close(again.at(), kept)
    assert untouched(sd)


@pytest.mark.parametrize("first", [0, 1])
def test_two_may_end_in_any_order(sd, first):
    ends = [ExitStack(), ExitStack()]
    maps = [end.enter_context(record_attention(sd)) for end in ends]
    sd.txt2img(PROMPT, **OPTIONS)
    torch.testing.assert_close(maps[0].at(), maps[1].at())
    ends[first].close()
    kept = maps[first].at()
    sd.txt2img("a smiling cat", **OPTIONS)  # recorded by the other alone
    assert "fox" in maps[first].tokens and "cat" in maps[1 - first].tokens
    torch.testing.assert_close(maps[first].at(), kept)
    ends[1 - first].close()
    assert untouched(sd)


def test_what_another_thread_draws_is_not_recorded(sd):
    plain, drawn = sd.txt2img("a smiling cat", **OPTIONS).pictures, []
    with record_attention(sd) as maps:
        sd.txt2img(PROMPT, **OPTIONS)
        kept = maps.at()
        thread = threading.Thread(target=lambda: drawn.append(sd.txt2img("a smiling cat", **OPTIONS).pictures))
        thread.start()
        thread.join()
    assert torch.equal(drawn[0], plain)  # to the last bit: it computes its attention as usual
    assert "fox" in maps.tokens and len(maps.timesteps) == 3
    torch.testing.assert_close(maps.at(), kept)


def test_what_another_model_with_the_same_text_encoder_draws_is_not_recorded(sd):
    other = copy.deepcopy(sd)
    other.cond_stage_model = sd.cond_stage_model
    with record_attention(sd) as maps:
        for _ in zip(other.sample("a smiling cat", **OPTIONS), sd.sample(PROMPT, **OPTIONS), strict=True):
            pass
        kept = maps.at()
        other.txt2img("a smiling cat", **OPTIONS)
    assert "fox" in maps.tokens and len(maps.timesteps) == 3
    torch.testing.assert_close(maps.at(), kept)
    assert untouched(sd) and untouched(other)


def test_a_copy_of_the_model_is_not_recorded(sd):
    with record_attention(sd) as maps:
        twin = copy.deepcopy(sd)
        twin.txt2img(PROMPT, **OPTIONS)
    assert not maps.timesteps and untouched(twin)


def test_without_guidance_and_of_another_shape(sd):
    with record_attention(sd) as maps:
        sd.txt2img([PROMPT, "a smiling cat"], steps=2, guidance_scale=1.0, sampler="dpmpp_2m", height=32, width=48)
    assert not maps.guided and maps.at().shape == (16, 4, 6) and maps.at(token="cat", picture=1).shape == (4, 6)


def test_a_context_from_elsewhere_has_no_words(sd):
    context = sd.get_learned_conditioning([PROMPT])
    with record_attention(sd) as maps, torch.no_grad():
        sd.apply_model(torch.zeros(1, 4, 8, 8), torch.tensor([5]), context)
    assert maps.at(token=2).shape == (4, 4) and maps.timesteps == [5]
    with pytest.raises(ValueError, match="was not encoded inside"):
        maps.at(token="fox")


def test_what_is_not_there_is_named(drawn, make_sd, sd):
    maps, _ = drawn
    for options, message in [
        ({"token": "cat"}, "'cat' is not in the prompt, whose tokens are <start> a red"),
        ({"token": 16}, "there is no token 16"),
        ({"step": 3}, "there is no step 3: 3 calls"),
        ({"layer": "encoder"}, "no cross-attention was recorded in a layer 'encoder'"),
        ({"picture": 2}, "there is no picture 2: 2 were drawn"),
    ]:
        with pytest.raises(ValueError, match=message):
            maps.at(**options)
    with record_attention(sd) as averaged:
        sd.txt2img(PROMPT, **OPTIONS)
    with pytest.raises(ValueError, match="by_head=True"):
        averaged.at(head=0)

    from minisd.conditions import ClassConfig

    with pytest.raises(ValueError, match="reads no words"), record_attention(make_sd(cond_stage=ClassConfig(4, 32))):
        pass
