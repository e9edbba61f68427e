"""Files of weights: what is right loads to the last bit, what is wrong gets one sentence."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch

from minisd import PRESETS, BPETokenizer, CheckpointError, LatentDiffusion, UNetConfig, UNetModel, load, save
from minisd.checkpoint import SHIPPED, describe, load_weights, read_weights, write_weights


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sd = LatentDiffusion(PRESETS["tiny"], BPETokenizer.train(["a red circle", "two blue squares"], vocab_size=1024))
    return sd.half().float()  # what float16 can hold


@pytest.fixture
def folder(model, tmp_path):
    save(model, tmp_path / "model")
    return tmp_path / "model"


def test_what_was_saved_is_loaded(model, folder):
    loaded = load(folder, "cpu")
    assert loaded.config == model.config
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    prompt = ["two red squares, é!"]
    assert torch.equal(loaded.cond_stage_model.tokenize(prompt), model.cond_stage_model.tokenize(prompt))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_loads_like_the_safetensors_file(model, folder, zipped):
    state = {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(()), **model.state_dict()}
    torch.save({"state_dict": state, "global_step": 7}, folder / "a.ckpt", _use_new_zipfile_serialization=zipped)
    loaded = load(folder / "a.ckpt", "cpu")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


class Hostile:
    """Reading it as an ordinary pickle makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_a_pickle_that_runs_a_program_is_refused(folder, tmp_path):
    evil, trace = folder / "evil.ckpt", tmp_path / "it_ran"
    for pickled_as in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        pickled_as({"state_dict": {"a": torch.zeros(1)}, "callbacks": Hostile(trace)}, evil)
        with pytest.raises(CheckpointError, match="evil.ckpt was not read"):
            load(evil)
        assert not trace.exists()
    pickle.loads(evil.read_bytes())
    assert trace.exists()  # it would have run


@pytest.mark.parametrize("name", ["model.safetensors", "a.ckpt"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_a_truncated_file_is_named(model, folder, name, keep):
    torch.save(model.state_dict(), folder / "a.ckpt")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(CheckpointError) as error:
        load(folder / name)
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_safetensors_header_that_lies_is_refused(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load(folder)


def test_names_and_shapes_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path):
    config = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), context_dim=8)
    unet = UNetModel(config)
    state = {name: torch.ones_like(tensor) for name, tensor in unet.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    del state["time_embed.0.bias"]
    state["out.2.weight"] = torch.ones(4, 16, 3, 3)
    state["surplus"] = torch.ones(1)
    with pytest.raises(CheckpointError) as error:
        load_weights(unet, state, "some.ckpt")
    shape = "out.2.weight is [4, 16, 3, 3] instead of [4, 32, 3, 3]"
    for words in ("some.ckpt", "1 missing (time_embed.0.bias)", "1 superfluous (surplus)", shape):
        assert words in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: shutil.rmtree(f), "there is no model at"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
        (lambda f: (f / "config.json").write_text('{"unet": {"wings": 2}}'), "does not describe a model"),
        (lambda f: (f / "model.safetensors").unlink(), "no file of weights"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_something_says_what(folder, break_it, message):
    break_it(folder)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        load(folder)


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    path = folder / "model.safetensors"
    before = path.read_bytes()

    def full_disk(state, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minisd.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="what was there before is untouched"):
        write_weights({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert not list(folder.glob("*.unfinished"))


def test_info_counts_parameters_and_says_what_the_model_is(model, folder):
    text = describe(folder)
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters, float16" in text
    assert "image_size: 32" in text


@pytest.mark.parametrize("name", ["emoji", "tiny"])
def test_the_models_that_ship_are_whole(name):
    sd = load(name, "cpu")
    state = read_weights(SHIPPED / name / "model.safetensors")
    assert all(torch.isfinite(tensor).all() and tensor.dtype == torch.float16 for tensor in state.values())
    assert sd.config.scale_factor != 1.0  # measured, not assumed
    assert (SHIPPED / name / "README.md").read_text().count("\n") > 20  # the model card
