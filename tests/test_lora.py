"""LoRA and textual inversion: what they change, how they are trained, and files of diffusers and peft, both ways."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from minisd import load, lora, save
from minisd.lora import LoRA, LowRank, NewToken, add_token, load_lora, load_token

FOX = "a red fox, noto style"
OPTIONS = {"steps": 3, "guidance_scale": 2.0, "seed": 1}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(sd, rank: int = 3, alpha: float | None = None, size: float = 0.1) -> LoRA:
    """A LoRA that changes something: B is not zero."""
    adapter = LoRA.new(sd, rank, alpha)
    for i, (_, _, change) in enumerate(adapter.layers()):
        change.B.data = size * draw(i, *change.B.shape)
    return adapter.requires_grad_(False)


@pytest.fixture
def mine(make_sd):
    """A model of this test's own, which it may change."""
    return make_sd()


def pictures(sd, prompt=FOX):
    return sd.txt2img(prompt, **OPTIONS).pictures


# -- what a LoRA is --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, 5), alpha=st.floats(0.1, 10), strength=st.floats(-1, 2), seed=st.integers(0, 99))
def test_a_layer_gets_a_change_of_low_rank(rank, alpha, strength, seed):
    """y = W x + b + s (α/r) B A x (LoRA, eq. 3), merged and not."""
    unet = nn.Sequential(nn.Linear(6, 8))
    x, A, B = draw(seed, 4, 6), draw(seed + 1, rank, 6), draw(seed + 2, 8, rank)
    weight = unet[0].weight.detach().clone()
    expected = x @ (weight + strength * alpha / rank * B @ A).T + unet[0].bias
    adapter = LoRA(unet, {"0": LowRank(A, B, alpha / rank)}, strength)
    torch.testing.assert_close(unet(x), expected, atol=1e-4, rtol=1e-4)
    adapter.merge()
    torch.testing.assert_close(unet(x), expected, atol=1e-4, rtol=1e-4)
    adapter.merge()  # a second time changes nothing
    torch.testing.assert_close(unet(x), expected, atol=1e-4, rtol=1e-4)
    adapter.unmerge()
    torch.testing.assert_close(unet[0].weight.detach(), weight, atol=1e-5, rtol=1e-5)
    adapter.remove()
    torch.testing.assert_close(unet(x), x @ weight.T + unet[0].bias, atol=1e-4, rtol=1e-4)


def test_a_new_lora_changes_nothing_and_is_on_the_four_projections(mine):
    before = pictures(mine)
    adapter = LoRA.new(mine, rank=2)
    assert torch.equal(pictures(mine), before)
    names = [name for name, *_ in adapter.layers()]
    assert len(names) == 4 * sum(name.endswith(("attn1", "attn2")) for name, _ in mine.named_modules())
    assert {name.rpartition(".to_")[2] for name in names} == {"q", "k", "v", "out.0"}
    assert not [name for name in mine.state_dict() if "changes" in name]
    again = LoRA.new(mine, rank=2)
    assert all(torch.equal(a.A, b.A) for (*_, a), (*_, b) in zip(adapter.layers(), again.layers(), strict=True))


def test_its_strength_goes_from_nothing_to_all_of_it(mine):
    before = pictures(mine)
    adapter = trained(mine)
    full = pictures(mine)
    adapter.strength = 0.0
    assert torch.equal(pictures(mine), before)
    adapter.strength = 1.0
    assert torch.equal(pictures(mine), full) and (full - before).abs().max() > 1e-2


def test_a_merged_model_draws_the_same_and_keeps_the_change_when_saved(mine, tmp_path):
    adapter = trained(mine)
    expected = pictures(mine)
    adapter.merge()
    torch.testing.assert_close(pictures(mine), expected, atol=1e-3, rtol=0)
    save(mine, tmp_path / "merged")
    torch.testing.assert_close(pictures(load(tmp_path / "merged", "cpu")), expected, atol=1e-3, rtol=0)


def test_two_loras_add_up(mine, make_sd, tmp_path):
    trained(mine, 2).save(tmp_path / "a.safetensors")
    plain = make_sd()
    first, second = load_lora(plain, tmp_path / "a.safetensors", 0.5), load_lora(plain, tmp_path / "a.safetensors", 0.5)
    halves = pictures(plain)
    first.remove()
    second.strength = 1.0
    torch.testing.assert_close(halves, pictures(plain), atol=1e-3, rtol=0)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_lora_is_small_and_draws_the_same_when_it_is_loaded(mine, make_sd, tmp_path):
    adapter = trained(mine, 3, alpha=6.0)
    adapter.save(tmp_path / lora.LORA_FILE)
    other = make_sd()
    for path in (tmp_path, tmp_path / lora.LORA_FILE):
        again = load_lora(other, path, 0.7)
        adapter.strength = 0.7
        torch.testing.assert_close(pictures(other), pictures(mine), atol=5e-3, rtol=0)  # float16 in the file
        again.remove()
    numbers = sum(parameter.numel() for parameter in adapter.parameters())
    assert (tmp_path / lora.LORA_FILE).stat().st_size < 2 * numbers + 20_000


def test_the_lora_of_the_model_that_ships_has_about_100_kilobytes(tmp_path):
    LoRA.new(load("emoji", "cpu")).save(tmp_path / "a.safetensors")
    assert 50_000 < (tmp_path / "a.safetensors").stat().st_size < 250_000


@pytest.fixture(scope="module")
def pipeline(diffusers, make_sd, tmp_path_factory):
    pytest.importorskip("peft", reason='no peft: pip install -e ".[dev]"')
    folder = tmp_path_factory.mktemp("model") / "diffusers"
    save(make_sd(), folder, layout="diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline, prompt=FOX, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(OPTIONS["seed"])
    drawn = pipeline(prompt, num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="latent",
                     **options)  # fmt: skip
    return drawn.images


def latents(sd, prompt=FOX):
    return sd.txt2img(prompt, **OPTIONS).trajectory[-1].x


def test_our_file_in_their_pipeline_draws_the_same(pipeline, mine, tmp_path):
    adapter = trained(mine, 3, alpha=6.0)
    adapter.save(tmp_path / lora.LORA_FILE)
    before = theirs(pipeline)
    pipeline.load_lora_weights(tmp_path)
    for strength in (1.0, 0.4):
        adapter.strength = strength
        pipeline.set_adapters(pipeline.get_active_adapters(), strength)
        torch.testing.assert_close(latents(mine), theirs(pipeline), atol=5e-3, rtol=0)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(theirs(pipeline), before)
    assert (before - latents(mine)).abs().max() > 0.05


@pytest.mark.parametrize("written_by", ["diffusers", "peft"])
@pytest.mark.parametrize("targets", [[*lora.TARGETS], ["to_v", "ff.net.2"]], ids=["four", "others"])
def test_their_file_here_draws_the_same(pipeline, diffusers, mine, tmp_path, written_by, targets):
    import peft

    unet = copy.deepcopy(pipeline.unet)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    if written_by == "peft":
        wrapped = peft.get_peft_model(unet, config)
        unet = wrapped.base_model.model
    else:
        unet.add_adapter(config)
    for i, (name, parameter) in enumerate(unet.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.2 * draw(i, *parameter.shape)
    if written_by == "peft":
        wrapped.save_pretrained(tmp_path)
    else:
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, peft.utils.get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata={"r": 3, "lora_alpha": 5, "target_modules": targets},
        )  # fmt: skip
    changed = diffusers.StableDiffusionPipeline(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)
    changed.set_progress_bar_config(disable=True)
    before = latents(mine)
    load_lora(mine, tmp_path)
    torch.testing.assert_close(latents(mine), theirs(changed), atol=1e-3, rtol=0)
    assert (before - latents(mine)).abs().max() > 0.05


def _without(key):
    return lambda state: {k: v for k, v in state.items() if key not in k}


@pytest.mark.parametrize(
    "change, metadata, words",
    [
        (lambda s: {k.replace("attn1.to_q", "attn9.to_q"): v for k, v in s.items()}, {}, "no lora_A or lora_B of a"),
        (lambda s: {f"text_encoder.{k}": v for k, v in s.items()}, {}, "no lora_A or lora_B of a linear layer of this"),
        (lambda s: {k: v[:, :5].clone() if "A." in k else v for k, v in s.items()}, {}, "does not fit this model"),
        (_without("lora_B"), {}, r"does not fit this model: .* takes A"),
        (lambda s: {}, {}, "is empty"),
        (lambda s: {k: v.flatten()[0] for k, v in s.items()}, {}, "does not fit this model"),
        (lambda s: s, {"lora_alpha": "much"}, "does not say how its LoRA was made"),
        (lambda s: s, ["lora_alpha"], "does not say how its LoRA was made"),
        (lambda s: s, {"use_rslora": True}, "was made with use_rslora"),
        (lambda s: s, {"unet.use_dora": True}, "was made with use_dora"),
    ],
    ids=["another layer", "text encoder", "another width", "half of it", "empty", "numbers", "alpha", "list", "rslora",
         "dora"],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(mine, tmp_path, change, metadata, words):
    file = tmp_path / "a.safetensors"
    LoRA.new(mine).save(file)
    save_file(change(load_file(file)), file, {"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(ValueError, match=words):
        load_lora(mine, file)


def test_no_file_and_no_rank_are_refused(mine, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file of weights at"):
        load_lora(mine, tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="the rank must be at least 1, but it is 0"):
        LoRA.new(mine, 0)
    with pytest.raises(ValueError, match="no linear layers named to_z"):
        LoRA.new(mine, targets=("to_z",))


# -- textual inversion ------------------------------------------------------------------------------------------------


def test_a_new_word_is_one_token_wherever_it_stands(mine, tmp_path):
    before = mine.get_learned_conditioning([FOX])
    number = add_token(mine, "<toy>", draw(0, 32))
    ids = mine.cond_stage_model.tokenize(["a red <toy>, noto style", "<toy>s"])
    assert (ids == number).sum(1).tolist() == [1, 1]
    assert torch.equal(mine.get_learned_conditioning([FOX]), before)  # other prompts mean what they meant
    save(mine, tmp_path / "model")
    again = load(tmp_path / "model", "cpu")
    torch.testing.assert_close(pictures(again, "a <toy>"), pictures(mine, "a <toy>"))


def test_a_file_of_a_word_goes_there_and_back(mine, make_sd, tmp_path):
    word = NewToken(mine, "<toy>", "red fox")
    ids = mine.cond_stage_model.tokenize(["red fox"])[0]
    count = ids.tolist().index(mine.cond_stage_model.tokenizer.end_token) - 1
    table = mine.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
    torch.testing.assert_close(word.vector, table[ids[1 : 1 + count]].mean(0))
    word.vector.data = draw(3, 32)
    word.save(tmp_path / lora.TOKEN_FILE)
    other = make_sd()
    assert load_token(other, tmp_path) == "<toy>"
    torch.testing.assert_close(pictures(other, "a <toy>"), pictures(mine, "a <toy>").detach())


def test_our_word_in_their_pipeline_draws_the_same(pipeline, mine, tmp_path):
    save_file({"<toy>": draw(4, 32)}, tmp_path / "toy.safetensors")
    load_token(mine, tmp_path / "toy.safetensors")
    pipeline = copy.deepcopy(pipeline)
    pipeline.load_textual_inversion(tmp_path / "toy.safetensors")
    torch.testing.assert_close(latents(mine, "a <toy>"), theirs(pipeline, "a <toy>"), atol=1e-3, rtol=0)


def test_what_cannot_be_a_new_word_is_refused(mine, make_sd, tmp_path):
    for word in ("a", "", "two words", "<Toy>"):
        with pytest.raises(ValueError, match="can't be a new word: take one in small letters"):
            add_token(mine, word, draw(0, 32))
    with pytest.raises(ValueError, match=r"vectors \[32\], and not \[7\]"):
        add_token(mine, "<toy>", draw(0, 7))
    add_token(mine, "<toy>", draw(0, 32))
    with pytest.raises(ValueError, match="can't be a new word"):
        add_token(mine, "<toy>", draw(0, 32))
    save_file({"<a>": draw(0, 32), "<b>": draw(0, 32)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="holds 2 tensors"):
        load_token(mine, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="like must be words that the model knows"):
        NewToken(mine, "<new>", "")


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Eight small pictures with captions."""
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 255 - 30 * i, 80)).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text("a <toy> in red")
    return tmp_path / "pictures"


def run(*arguments):
    from minisd.cli import main

    main([str(argument) for argument in arguments])


SHORT = ["--steps", 4, "--batch-size", 4, "--warmup", 1, "--log-every", 1, "--sample-every", 4, "--save-every", 2,
         "--device", "cpu"]  # fmt: skip


def test_a_lora_is_trained_by_one_command_and_drawn_with_by_another(folder, tmp_path, capsys):
    run("train", "lora", "--init", "tiny", "--data", folder, "--out", tmp_path / "run", "--rank", 2, *SHORT)
    file = tmp_path / "run/lora" / lora.LORA_FILE
    assert f"--lora {file}" in capsys.readouterr().out
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(file).items() if "lora_B" in name)
    assert not (tmp_path / "run/lora/model").exists()
    drawn = {}
    for name, flags in {"plain": [], "lora": ["--lora", file], "none": ["--lora", f"{file}:0"],
                        "ten": ["--lora", f"{file}:10"]}.items():  # fmt: skip
        run("txt2img", "a star", "--model", "tiny", "--steps", 2, "--num-images", 1, "--device", "cpu", *flags,
            "--out", tmp_path / f"{name}.png")  # fmt: skip
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
    assert drawn["plain"] == drawn["none"] and len(set(drawn.values())) == 3


def test_only_the_lora_is_trained_and_a_run_goes_on_where_it_stopped(folder, tmp_path):
    from minisd.data import CaptionedPictures
    from minisd.training import SingleDevice, UNetRecipe, train_unet

    recipe = UNetRecipe(steps=6, batch_size=4, lr=1e-2, warmup=1, save_every=2, sample_every=99, log_every=1)
    data, finished = CaptionedPictures(folder, 32, "train"), []
    for name, stops in {"at once": [], "in two": [3]}.items():
        for stop in [*stops, None]:
            sd = load("tiny", "cpu")
            before = {k: v.clone() for k, v in sd.state_dict().items()}
            adapter = LoRA.new(sd, 2)
            if stop:
                adapter.save = lambda path: None
                forward, calls = adapter.forward, iter(range(stop))
                adapter.forward = lambda *args, f=forward, c=calls: (next(c), f(*args))[1]  # the fourth call ends it
            try:
                train_unet(sd, recipe, data, tmp_path / name, SingleDevice("cpu"), adapter=adapter)
            except (StopIteration, RuntimeError):
                assert stop
                continue
            assert all(torch.equal(before[k], v) for k, v in sd.state_dict().items())
        finished.append(load_file(tmp_path / name / lora.LORA_FILE))
    for key, tensor in finished[0].items():
        torch.testing.assert_close(finished[1][key], tensor)


def test_a_new_word_is_trained_by_one_command_and_drawn_with_by_another(folder, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", "token", "<toy>", "--like", "circle", "--init", "tiny", "--data", folder, "--out", out, *SHORT)
    file = tmp_path / "run/token" / lora.TOKEN_FILE
    assert f"--token {file}" in capsys.readouterr().out
    (vector,) = load_file(file).values()
    sd = load("tiny", "cpu")
    start = NewToken(sd, "<toy>", "circle").vector.detach()
    assert vector.shape == start.shape and (vector - start).abs().max() > 1e-4
    run("txt2img", "a <toy>", "--model", "tiny", "--steps", 2, "--num-images", 1, "--token", file, "--device", "cpu",
        "--out", tmp_path / "toy.png")  # fmt: skip
    assert (tmp_path / "toy.png").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["lora", "--init", "tiny", "--rank", 0], "the rank must be at least 1"),
        (["token", "<cat>", "--like", "circle", "--init", "tiny"], "no caption in .* has the word <cat>"),
        (["token", "--init", "tiny"], "like must be words that the model knows"),
        (["token", "circle", "--like", "star", "--init", "tiny"], "'circle' can't be a new word"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence(folder, tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=words):
        run("train", *arguments, "--data", folder, "--out", tmp_path / "run", *SHORT)
