"""Files of weights: what is right loads to the last bit, what is wrong gets one sentence."""

import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import types
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch

from minisd import PRESETS, BPETokenizer, CheckpointError, LatentDiffusion, UNetConfig, UNetModel, load, load_clip, save
from minisd.checkpoint import SHIPPED, describe, has_clip, load_weights, read_weights, save_clip, write_weights
from minisd.checkpoint import diffusers as layout
from minisd.clip import CLIPModel, CLIPVisionConfig
from minisd.conditions import ClassConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sd = LatentDiffusion(PRESETS["tiny"], BPETokenizer.train(["a red circle", "two blue squares"], vocab_size=1024))
    return sd.half().float()  # what float16 can hold


@pytest.fixture
def folder(model, tmp_path):
    save(model, tmp_path / "model", dtype=torch.float16)
    return tmp_path / "model"


def test_what_was_saved_is_loaded(model, folder):
    loaded = load(folder, "cpu")
    assert loaded.config == model.config
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    prompt = ["two red squares, é!"]
    assert torch.equal(loaded.cond_stage_model.tokenize(prompt), model.cond_stage_model.tokenize(prompt))


@pytest.mark.parametrize("on", [False, True])
def test_a_config_that_still_names_gradient_checkpointing_loads(model, folder, on):
    """minisd 0.1 wrote it among the UNet's fields. It never changed what the model is."""
    config = json.loads((folder / "config.json").read_text())
    config["unet"]["use_checkpoint"] = on
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder, "cpu").config == model.config


@pytest.mark.parametrize("content", [[], {}, {"state_dict": 3}, {1: torch.zeros(1)}, {"a": "b"}, torch.zeros(3)])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="holds no table of named tensors"):
        read_weights(tmp_path / "a.ckpt")


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


def checkpoint_of_lightning(state: dict, folder, monkeypatch, module: str, zipped: bool = True):
    """A file as the official ones are: beside the weights, what Lightning's callbacks had to remember."""
    package, _, rest = module.partition(".")
    for name in [package, *(f"{package}.{'.'.join(rest.split('.')[: i + 1])}" for i in range(rest.count(".") + 1))]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": module})
    attributes = type("AttributeDict", (dict,), {"__module__": module})
    sys.modules[module].ModelCheckpoint, sys.modules[module].AttributeDict = callback, attributes
    remembered = callback()
    remembered.best_model_score = torch.tensor(0.5)
    content = {
        "epoch": 142, "state_dict": state, "callbacks": {callback: {"monitor": None}, "checkpoint": remembered},
        "optimizer_states": [], "pytorch-lightning_version": "1.4.2",
        "hyper_parameters": attributes(lr=1e-4, betas=(0.9, 0.999)),
    }  # fmt: skip
    torch.save(content, folder / "official.ckpt", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)  # it need not be installed to read the file
    return folder / "official.ckpt"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning"])
def test_classes_of_lightning_are_read_as_nothing(model, folder, monkeypatch, package, zipped):
    where = f"{package}.callbacks.model_checkpoint"
    file = checkpoint_of_lightning(model.state_dict(), folder, monkeypatch, where, zipped)
    state = read_weights(file)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(load(file, "cpu").model.diffusion_model.out[2].bias, state["model.diffusion_model.out.2.bias"])


def test_classes_of_another_package_are_refused(model, folder, monkeypatch):
    file = checkpoint_of_lightning(model.state_dict(), folder, monkeypatch, "lightningrod.callbacks")
    with pytest.raises(CheckpointError, match="holds more than tensors .lightningrod.callbacks.ModelCheckpoint"):
        load(file)


SCALAR = np._core.multiarray.scalar  # what a pickle rebuilds a number of numpy's by


class PicklerOfNumpy1(pickle._Pickler):
    """Names `numpy.core`, as the official files do; numpy 2 calls it `numpy._core`."""

    def save_global(self, obj, name=None):
        if obj is SCALAR:
            self.write(b"cnumpy.core.multiarray\nscalar\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


NUMPY_1 = types.SimpleNamespace(Pickler=PicklerOfNumpy1, dump=pickle.dump, __name__="pickle")


class Reduced:
    """Pickled as a call of `function`, and then of the result's `__setstate__`, if a state is given."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("numpy_", "module"), [(NUMPY_1, b"numpy.core"), (pickle, b"numpy._core")])
def test_numbers_of_numpy_beside_the_weights_are_read_as_nothing(model, folder, numpy_, module, zipped):
    """The official files have them in `lr_schedulers`: the learning rate is computed with `np.cumsum`."""
    content = {
        "state_dict": model.state_dict(),
        "lr_schedulers": [{"last_epoch": np.int64(470_000), "_last_lr": [np.float64(5e-6)], "lr_lambdas": [{}]}],
        "optimizer_states": [{"param_groups": [{"lr": np.float32(1e-4), "amsgrad": np.bool_(False)}]}],
        "callbacks": {"best": np.float64("nan"), "monitor": np.str_("val/loss")},
    }
    file = folder / "official.ckpt"
    torch.save(content, file, numpy_, pickle_protocol=2, _use_new_zipfile_serialization=zipped)
    for name in (module + b".multiarray\nscalar", b"numpy\ndtype", b"_codecs\nencode"):
        assert b"c" + name + b"\n" in file.read_bytes()
    state = read_weights(file)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(load(file, "cpu").model.diffusion_model.out[2].bias, state["model.diffusion_model.out.2.bias"])
    # they were let in for the time of reading only
    assert not [known for known in torch.serialization.get_safe_globals() if "numpy" in str(known)]


@pytest.mark.parametrize(
    "crafted",
    [
        Reduced(np.dtype, "no dtype that numpy has"),
        # numpy believes the flags of the first, and would read the second's bytes as a pointer to an object
        Reduced(SCALAR, Reduced(np.dtype, "f8", False, True, state=(3, "<", None, None, None, 8, 8, 63)),
                b"\x01" * 8),
        Reduced(SCALAR, Reduced(np.dtype, "V8", False, True, state=(3, "|", None, ("a",),
                {"a": (np.dtype("O"), 0)}, 8, 1, 0)), b"\x01" * 8),
    ],
    ids=["no dtype", "a number with an object's flags", "an object in a structure"],
)  # fmt: skip
@pytest.mark.parametrize("numpy_", [NUMPY_1, pickle])
def test_a_file_can_not_make_numpy_run(folder, numpy_, crafted):
    torch.save({"state_dict": {"a": torch.ones(1)}, "lr": crafted}, folder / "crafted.ckpt", numpy_)
    assert read_weights(folder / "crafted.ckpt").keys() == {"a"}


def test_a_program_hidden_in_a_number_of_numpys_is_refused(folder, tmp_path):
    evil, trace = folder / "evil.ckpt", tmp_path / "it_ran"
    program = Hostile(trace)
    in_its_dtype = Reduced(np.dtype, "f8", False, True, state=program)
    for numpy_ in (NUMPY_1, pickle):
        for hidden in (Reduced(SCALAR, np.dtype("f8"), program), in_its_dtype, [np.float64(1), program]):
            torch.save({"state_dict": {"a": torch.ones(1)}, "lr": hidden}, evil, numpy_)
            with pytest.raises(CheckpointError, match="evil.ckpt was not read: it holds more than tensors .*mkdir"):
                load(evil)
            assert not trace.exists()


@pytest.mark.parametrize(
    "other",
    [
        np.arange(3.0),  # an array is rebuilt by functions of its own
        Reduced(np.load, "weights.npy"),
        Reduced(np.fromfile, "weights.npy"),
        Reduced(np._core.multiarray.fromstring, "1 2 3"),
        np.random.default_rng(0),
    ],
    ids=["an array", "load", "fromfile", "fromstring", "a generator"],
)
def test_nothing_else_of_numpy_is_let_in(folder, other):
    torch.save({"state_dict": {"a": torch.ones(1)}, "rest": other}, folder / "a.ckpt")
    with pytest.raises(CheckpointError, match="a.ckpt was not read: it holds more than tensors .numpy") as error:
        load(folder / "a.ckpt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_nan_or_infinite_are_named(model, folder, bad):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.diffusion_model.out.0.weight"][3] = bad
    write_weights(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.diffusion_model.out.0.weight in .* holds NaN or infinity"):
        load(folder)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "old.ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_is_found_wherever_it_is(tmp_path, name, dtype):
    """In the last of many pieces, in a view of a larger tensor, in one number alone."""
    large = torch.zeros(3, 2**21 + 7, dtype=dtype)
    state = {"large": large, "view": torch.zeros(10, dtype=dtype)[4:], "one": torch.zeros((), dtype=dtype),
             "whole numbers": torch.arange(5), "empty": torch.zeros(0, dtype=dtype)}  # fmt: skip

    def write():
        if name == "a.safetensors":
            return write_weights(state, tmp_path / name)
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "a.ckpt")

    write()
    assert read_weights(tmp_path / name).keys() == state.keys()
    if hasattr(torch, "float8_e4m3fn") and name != "old.ckpt":  # of eight bits: of Stable Diffusion, some have that
        write_weights({"a": torch.ones(9).to(torch.float8_e4m3fn)}, tmp_path / "eight.safetensors")
        assert read_weights(tmp_path / "eight.safetensors")["a"].float().tolist() == [1] * 9
    for bad, place in (("large", (2, -1)), ("view", (5,)), ("one", ())):
        state[bad][place] = torch.nan
        write()
        with pytest.raises(CheckpointError, match=f"{bad} in .* holds NaN"):
            read_weights(tmp_path / name)
        read_weights(tmp_path / name, check=False)
        state[bad][place] = 0


@pytest.mark.parametrize("name", ["a.ckpt", "old.ckpt"])
@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, 1], lambda x: x[::2], lambda x: x[0, 1].expand(50), lambda x: x[:2, 1:]],
    ids=["transposed", "column", "every other row", "expanded", "corner"],
)
def test_only_the_numbers_of_a_view_itself_are_checked(tmp_path, name, view):
    """A `.ckpt` keeps a view as a place in a larger tensor, and its numbers need not lie side by side there."""
    own = set(view(torch.arange(12).view(4, 3)).flatten().tolist())  # the places of its numbers
    for place in range(12):
        large = torch.zeros(4, 3)
        large.view(-1)[place] = torch.nan
        torch.save({"view": view(large)}, tmp_path / name, _use_new_zipfile_serialization=name == "a.ckpt")
        if place in own:
            with pytest.raises(CheckpointError, match="view in .* holds NaN"):
                read_weights(tmp_path / name)
        else:
            assert torch.equal(read_weights(tmp_path / name)["view"], view(large))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_nan_in_a_tensor_that_is_set_aside_does_no_harm(model, tmp_path, suffix):
    """A discriminator, an EMA or an optimiser that went wrong is not read, so the model is sound all the same."""
    file = tmp_path / f"model{suffix}"
    save(model, file)
    state = {name: tensor.clone() for name, tensor in read_weights(file).items()}
    nan = {name: torch.tensor([float("nan")]) for name in (
        "first_stage_model.loss.logvar", "model_ema.diffusion_modelout2bias", "posterior_variance",
    )}  # fmt: skip
    write = (
        write_weights
        if suffix == ".safetensors"
        else lambda state, file: torch.save(
            {"state_dict": state, "optimizer_states": [{"exp_avg": torch.tensor(float("nan"))}]}, file
        )
    )
    write(state | nan, file)
    loaded = load(file, "cpu").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    # the scale factor is no weight, but it is read
    write(state | {"scale_factor": torch.tensor(float("nan"))}, file)
    with pytest.raises(CheckpointError, match="scale_factor in .* holds NaN"):
        load(file, "cpu")


def test_weights_that_another_file_replaces_may_hold_nan(model, folder):
    """Of a minisd folder, a file of weights beside `model.safetensors` replaces some of its tensors."""
    state = read_weights(folder / "model.safetensors")
    sound = {name: tensor.clone() for name, tensor in state.items() if name.startswith("first_stage_model.")}
    broken = {name: tensor * (torch.nan if name in sound else 1) for name, tensor in state.items()}
    write_weights(sound, folder / "vae.safetensors")
    write_weights(broken, folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in load(folder / "vae.safetensors", "cpu").state_dict().values())
    with pytest.raises(CheckpointError, match="first_stage_model.* holds NaN"):
        load(folder, "cpu")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_ckpt_that_another_program_repacked_is_read_and_checked(tmp_path, compression):
    """Its tensors lie elsewhere than PyTorch would have put them."""

    def packed_anew(state):
        torch.save(state, tmp_path / "a.ckpt")
        with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w", compression) as new:
            for record in old.namelist():
                new.writestr(record, old.read(record))
        return read_weights(tmp_path / "b.ckpt")

    state = {f"{i}": torch.randn(1000 + i, generator=torch.Generator().manual_seed(i)) for i in range(20)}
    again = packed_anew(state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    state["7"][-1] = float("nan")
    with pytest.raises(CheckpointError, match="7 in .*b.ckpt holds NaN"):
        packed_anew(state)


def test_weights_whose_sum_overflows_are_accepted(tmp_path):
    write_weights({"a": torch.full((4,), 3e38)}, tmp_path / "a.safetensors")
    assert read_weights(tmp_path / "a.safetensors")["a"].tolist() == torch.full((4,), 3e38).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_computes_in_the_dtype_asked_for_and_its_latents_stay_exact(folder, dtype):
    whole, half = load(folder, "cpu"), load(folder, "cpu", dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {half.dtype} == {dtype}
    ours, expected = (sd.txt2img("two red squares", steps=4, seed=1) for sd in (half, whole))
    assert {step.x.dtype for step in ours.trajectory.steps} == {ours.pictures.dtype} == {torch.float32}
    assert 0 < (ours.pictures - expected.pictures).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["large.safetensors", "large.ckpt"])
def test_reading_a_large_file_takes_hardly_any_memory(tmp_path, name):
    """200 MB, looked through and put into a model: they stay in the file, and never are in memory all at once."""
    state = {f"{i}.weight": torch.full((1000, 5000), float(i)) for i in range(10)}
    write_weights(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    code = f"""
        import torch
        from minisd.checkpoint import load_weights, read_weights

        def peak():
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1000

        with torch.device("meta"):
            model = torch.nn.Sequential(*(torch.nn.Linear(5000, 1000, bias=False) for _ in range(10)))
        before = peak()
        load_weights(model, read_weights({str(tmp_path / name)!r}), "the file", "cpu")
        assert peak() < before + 80, peak() - before
        assert [layer.weight[7, 7].item() for layer in model] == list(range(10))
        """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("only Linux tells how much memory a process had at most")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_written_files_have_the_permissions_of_new_files(model, tmp_path):
    (tmp_path / "new").write_text("")
    save(model, tmp_path / "model")
    modes = {file.stat().st_mode for file in (tmp_path / "model").rglob("*") if file.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


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

    def full_disk(state, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minisd.checkpoint.files.save_file", full_disk)
    with pytest.raises(OSError, match="what was there before is untouched"):
        write_weights({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert not list(folder.glob("*.unfinished"))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_save_left_does_not_stand_in_the_way_of_the_next(model, tmp_path, kind):
    for name in ("model", "weights.safetensors"):
        left_over = tmp_path / f"{name}.unfinished"
        if kind == "file":
            left_over.write_text("x")
        else:
            (left_over / "tokenizer").mkdir(parents=True)
            (left_over / "tokenizer" / "old.json").write_text("x")
    save(model, tmp_path / "model")
    write_weights({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["model", "weights.safetensors"]
    assert not (tmp_path / "model" / "tokenizer" / "old.json").exists()
    load(tmp_path / "model", "cpu")


def test_a_new_folder_is_there_whole_or_not_at_all(model, tmp_path, monkeypatch):
    rename, seen = os.replace, []

    def look_and_rename(source, target):
        rename(source, target)
        seen.append(sorted(p.name for p in (tmp_path / "model").rglob("*") if p.is_file()))

    monkeypatch.setattr(os, "replace", look_and_rename)
    save(model, tmp_path / "model")
    *before, after = seen
    assert before and not any(before)
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt"} <= set(after)


# -- whole or not at all ---------------------------------------------------------------------------------------------


def halved(model):
    """Another model of the same kind."""
    other = LatentDiffusion(model.config, model.cond_stage_model.tokenizer)
    other.load_state_dict({name: tensor / 2 for name, tensor in model.state_dict().items()})
    return other.eval()


def same(a, b) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def write(sd, path, form):
    save(sd, path, layout=form)
    if form == "minisd":  # the rest of a CLIP, which only this layout has
        vision = CLIPVisionConfig(image_size=32, patch_size=8, width=64, layers=1, heads=1, projection_dim=32)
        clip = CLIPModel(sd.config.cond_stage, vision, sd.cond_stage_model.tokenizer.end_token)
        clip.text_model.load_state_dict(sd.cond_stage_model.transformer.text_model.state_dict())
        save_clip(clip, sd.cond_stage_model.tokenizer, path)


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def interrupted(act, moment: list[int], how):
    """The function `act`, whose call number moment[0] ends in an error instead. `moment` is shared and counts down."""

    def acts(*arguments, **options):
        moment[0] -= 1
        if moment[0] == -1:
            raise how(13, "in use by another process")
        return act(*arguments, **options)

    return acts


@pytest.mark.parametrize(
    ("form", "name", "how", "moments"),
    [
        ("minisd", "m", Killed, range(0, 100, 2)),
        ("minisd", "m", PermissionError, range(1, 100, 2)),
        ("diffusers", "m", Killed, range(0, 100, 5)),
        ("compvis", "m.safetensors", Killed, range(0, 100, 3)),
    ],
    ids=["minisd's", "a file in use", "diffusers'", "CompVis's"],
)
def test_whenever_a_save_ends_the_old_model_is_there_whole_or_the_new_one(
    tmp_path, monkeypatch, form, name, how, moments
):
    model = fuzz.small_model()
    new, mine = halved(model), {tmp_path / "m" / "README.md": "my notes", tmp_path / "m" / "unet" / "mine.txt": "mine"}
    for moment in moments:
        shutil.rmtree(tmp_path)
        (tmp_path / "m" / "unet").mkdir(parents=True)
        for path, text in mine.items():
            path.write_text(text)
        write(model, tmp_path / name, form)
        left = [moment]
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", interrupted(os.replace, left, how))
            patched.setattr(Path, "unlink", interrupted(Path.unlink, left, how))
            try:
                save(new, tmp_path / name, layout=form)
            except (Killed, OSError):
                pass
        finished = left[0] >= 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load(tmp_path / name, "cpu")
            assert same(found, new) or (same(found, model) and not finished), moment
            if has_clip(tmp_path / name):  # the old CLIP beside the new model would be neither
                assert same(found, model)
                load_clip(tmp_path / name)
            if not finished:
                save(new, tmp_path / name, layout=form)  # the next save completes it
                assert same(load(tmp_path / name, "cpu"), new)
        assert {path: path.read_text() for path in mine} == mine
        assert not [*tmp_path.rglob("*.unfinished"), *tmp_path.rglob("*.to_be_moved")]
        if finished:
            break
    assert 5 < moment < 90


def test_a_model_is_not_written_over_something_else(model, folder, tmp_path):
    save(model, tmp_path / "theirs", layout="diffusers")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"my": "settings"}')
    (tmp_path / "mine.yaml").write_text("my: settings")
    (tmp_path / "vae.json").write_text("{}")
    (tmp_path / "vae.safetensors").write_bytes(b"of a training")
    save(model, tmp_path / "model" / "mine.ckpt")
    save(model, tmp_path / "a.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = LatentDiffusion(replace(model.config, parameterization="v"), model.cond_stage_model.tokenizer)
    for path, form in (
        ("theirs", "minisd"), ("model", "diffusers"), ("mine", "minisd"), ("mine", "diffusers"), ("mine.ckpt", None),
        ("a.ckpt", None), ("model/model.safetensors", None), ("model/config.json", "minisd"), ("vae.safetensors", None),
        ("theirs/unet/diffusion_pytorch_model.safetensors", None),
    ):  # fmt: skip
        with pytest.raises(OSError, match="choose another|is a file"):
            save(other, tmp_path / path, layout=form)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    save(other, tmp_path / "model" / "mine.ckpt")


def test_the_rest_of_clip_stays_as_long_as_its_text_tower_does(model, folder):
    write(model, folder, "minisd")
    again = load(folder, "cpu")
    with torch.no_grad():
        again.model.diffusion_model.out[2].bias.add_(1)
    save(again, folder)
    load_clip(folder)
    save(halved(model), folder)
    assert not has_clip(folder) and not list(folder.glob("clip.*"))


def test_a_clip_is_not_written_beside_a_model_with_another_text_tower(model, folder):
    write(model, folder, "minisd")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    clip, tokenizer = load_clip(folder)
    with torch.no_grad():
        clip.text_model.embeddings.token_embedding.weight.mul_(2)
    with pytest.raises(FileExistsError, match="has another text tower than this CLIP: choose another folder"):
        save_clip(clip, tokenizer, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_clip_beside_a_model_without_a_text_tower_keeps_its_own(model, folder):
    write(model, folder, "minisd")
    clip, tokenizer = load_clip(folder)
    classes = replace(model.config, cond_stage=ClassConfig(3, model.config.unet.context_dim))
    save(LatentDiffusion(classes), folder)
    save_clip(clip, tokenizer, folder)
    assert same(load_clip(folder)[0], clip)


def test_other_forms_of_the_old_weights_do_not_stay_beside_the_new_ones(model, tmp_path):
    """A variant and a tokenizer.json would be read before what was saved last."""
    save(model, tmp_path / "m", layout="diffusers")
    unet = tmp_path / "m" / "unet"
    shutil.copy(unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "m" / "tokenizer" / "added_tokens.json").write_text('{"<cat>": 1023}')
    save(halved(model), tmp_path / "m", layout="diffusers")
    assert not list((tmp_path / "m").rglob("*fp16*")) and not list((tmp_path / "m").rglob("added_tokens.json"))
    assert same(load(tmp_path / "m", "cpu"), halved(model))


# -- names -------------------------------------------------------------------------------------------------------------


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("name", ["m", "m.ckpt"])
@pytest.mark.parametrize("wrap", [compiled, torch.nn.DataParallel, lambda m: torch.nn.DataParallel(compiled(m))])
def test_a_wrapped_model_is_saved_as_the_model_in_it(model, tmp_path, wrap, name):
    sd = halved(model)
    sd.model.diffusion_model = wrap(sd.model.diffusion_model)
    sd.first_stage_model.decoder = wrap(sd.first_stage_model.decoder)
    save(wrap(sd) if name == "m" else sd, tmp_path / name)
    assert same(load(tmp_path / name, "cpu"), halved(model))
    save(sd, tmp_path / "theirs", layout="diffusers")
    assert same(load(tmp_path / "theirs", "cpu"), halved(model))


def test_names_of_a_wrapped_model_are_read(model, folder):
    wrapped = {name.replace("input_blocks", "_orig_mod.input_blocks"): t for name, t in model.state_dict().items()}
    state = {f"module.{name}": tensor for name, tensor in wrapped.items()}
    write_weights(state, folder / "model.safetensors")
    assert same(load(folder, "cpu"), model)
    state["module.model.diffusion_model.out.2.bias"] = torch.full((4,), torch.nan)
    write_weights(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.diffusion_model.out.2.bias in .* holds NaN"):
        load(folder, "cpu")


def test_a_name_too_many_can_be_let_through(model, tmp_path):
    save(model, tmp_path / "a.safetensors")
    state = read_weights(tmp_path / "a.safetensors")
    extra = {"cond_stage_model.logit_scale": torch.tensor(4.6), "denoiser.sigmas": torch.zeros(3)}
    write_weights(state | extra, tmp_path / "a.safetensors")  # which mergers of models leave, and nothing needs
    load(tmp_path / "a.safetensors", "cpu")
    write_weights(state | {"mine": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="1 superfluous .mine.*ignore="):
        load(tmp_path / "a.safetensors", "cpu")
    assert same(load(tmp_path / "a.safetensors", "cpu", ignore=["mine"]), model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_would_lose_the_weights_is_refused(model, folder, dtype):
    before = (folder / "model.safetensors").read_bytes()
    for act in (lambda: load(folder, "cpu", dtype), lambda: save(model, folder, dtype=dtype)):
        with pytest.raises(ValueError, match=f"dtype must be float16, bfloat16, float32 or float64, not {dtype}"):
            act()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_link_to_nothing_is_not_written_over(model, tmp_path):
    (tmp_path / "m").symlink_to("nowhere")
    with pytest.raises(OSError, match="m is neither a file nor a folder"):
        save(model, tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


# -- more than the memory holds ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to such a limit")
def test_a_model_that_does_not_fit_into_memory_is_refused_in_a_sentence(tmp_path):
    """A file of 320 MB, mostly a hole, in a process that may take 200 MB more than it has, and then 800 MB."""
    model, words = fuzz.small_model(), 5_000_000
    save(model, tmp_path / "m", dtype=torch.float16)
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["cond_stage"]["vocab_size"] = words
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        shape = [words, *tensor.shape[1:]] if name.endswith("token_embedding.weight") else list(tensor.shape)
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    with (tmp_path / "m/model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    program = """
import resource, sys
from pathlib import Path
import minisd
from minisd.checkpoint import describe
for more, read in ((200, describe), (200, minisd.load), (800, describe), (800, minisd.load)):
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more * 2**20, resource.RLIM_INFINITY))
    try:
        read("m")
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("read")
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert len(told.stdout.splitlines()) == 4, told.stdout + told.stderr[-2000:]
    described, loaded, described_in_more, loaded_in_more = told.stdout.splitlines()
    assert described.startswith("CheckpointError there is not enough memory: ") and loaded == described
    assert described_in_more == "read"
    assert re.match("OutOfMemoryError there is not enough memory: take a dtype of half the size", loaded_in_more)


# -- damaged files, and files of something else ------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path, compression):
    torch.save({"a": torch.randn(1000)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w", compression) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    data = bytearray((tmp_path / "b.ckpt").read_bytes())
    with zipfile.ZipFile(tmp_path / "b.ckpt") as archive:
        data[archive.getinfo("a/data/0").header_offset + 2000] ^= 1
    (tmp_path / "b.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="b.ckpt is .*(damaged|no whole)"):
        read_weights(tmp_path / "b.ckpt")


def test_an_archive_that_was_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(10)}, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / "a.ckpt")["a"].sum() == 10


def test_numbers_in_the_byte_order_of_another_machine_are_turned(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
        for record in old.namelist():
            content = old.read(record)
            content = np.frombuffer(content, "<f4").astype(">f4").tobytes() if record.endswith("data/0") else content
            new.writestr(record, b"big" if record.endswith("byteorder") else content)
    assert read_weights(tmp_path / "b.ckpt")["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("begin", "what"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
    (b"  <!DOCTYPE html><html>Sign in</html>", "a web page"),
    (b"GGUF\x03", "a GGUF file"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/merges.txt"])
def test_a_pointer_or_a_page_in_the_place_of_a_file_is_named(folder, name, begin, what):
    (folder / name).write_bytes(begin)
    with pytest.raises(CheckpointError, match=f"{name} is .*{what}"):
        load(folder, "cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among its files")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/vocab.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises((CheckpointError, FileNotFoundError)):
        load(folder, "cpu")
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(FileNotFoundError, match="no ordinary file"):
        load(folder / "pipe.safetensors", "cpu")


def test_a_view_that_would_fill_the_memory_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="a in .* is no plain tensor"):
        read_weights(tmp_path / "a.ckpt")


def test_many_classes_of_lightning_are_read_in_one_pass(tmp_path):
    names = b"".join(b"clightning.a\nC%d\n" % i for i in range(2000))
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}X\x01\x00\x00\x00a](" + names + b"es.")
        archive.writestr("a/version", b"3\n")
    began = time.process_time()
    with pytest.raises(CheckpointError, match="no table of named tensors"):
        read_weights(tmp_path / "a.ckpt")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("place", "value", "message"), [
    (("cond_stage", "layers"), 10**9, "1,000,000,000 blocks"),
    (("unet", "channel_mult"), [1] * 20_000, "20,000 blocks"),
    (("first_stage", "num_res_blocks"), 10**7, "blocks"),
    (("timesteps",), 10**8, "timesteps must be"),
    (("parameterization",), "v_prediction", "one of eps, v, x0"),
    (("beta_schedule",), "quadratic", "one of scaled_linear"),
    (("scale_factor",), 0, "scale_factor must be"),
    (("scale_factor",), float("nan"), "scale_factor must be"),
    (("image_size",), -8, "image_size must be"),
    (("cond_stage", "heads"), 5, "among 5 heads"),
    (("cond_stage", "heads"), -2, "among -2 heads"),
    (("unet",), 5, "does not describe a model"),
])  # fmt: skip
def test_a_configuration_that_means_nothing_is_refused(folder, place, value, message):
    config = json.loads((folder / "config.json").read_text())
    part = config
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder, "cpu")
    assert "\n" not in str(error.value) and time.process_time() - began < 2


def test_what_would_be_ignored_is_refused(folder):
    given = {"config": "no such.yaml", "use_ema": True, "tokenizer": "x", "ignore": ["a"], "variant": "fp16"}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"{name} would be ignored"):
            load(folder, "cpu", **{name: value})


def test_a_path_into_a_folder_that_is_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(layout, "fetch", lambda *_: pytest.fail("it asked the hub"))
    for path in ("runs/foo", "mine/foo"):
        with pytest.raises(FileNotFoundError, match=f"there is no model at {path}"):
            load(path)


def test_info_counts_parameters_and_says_what_the_model_is(model, folder):
    text = describe(folder)
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters, float16" in text
    assert "image_size: 32" in text


@pytest.mark.parametrize("name", ["clip.safetensors", "vae.safetensors"])
def test_info_knows_the_files_of_a_run(model, folder, name):
    write(model, folder, "minisd")
    write_weights(model.first_stage_model.state_dict(), folder / "vae.safetensors")
    (folder / "vae.json").write_text('{"first_stage": {"ch": 32}}')
    expected = {"clip.safetensors": "vision: {'image_size': 32", "vae.safetensors": "first_stage: {'ch': 32}"}
    assert expected[name] in describe(folder / name)


@pytest.mark.parametrize("name", ["emoji", "tiny"])
def test_the_models_that_ship_are_whole(name):
    sd = load(name, "cpu")
    state = read_weights(SHIPPED / name / "model.safetensors")
    assert all(torch.isfinite(tensor).all() and tensor.dtype == torch.float16 for tensor in state.values())
    assert sd.config.scale_factor != 1.0  # measured, not assumed
    assert (SHIPPED / name / "README.md").read_text().count("\n") > 20  # the model card
