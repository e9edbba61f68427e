# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 9 · Stable Diffusion v1: the official file, and the official source
#
# So far, all models were ours. This notebook is about the real one: what lies in `sd-v1-4.ckpt` or `v1-5-pruned.ckpt`,
# why it loads here without being converted, how we know that the networks are the same to the last decimals, and how to
# read the source that it was trained with.
#
# You will understand
#
# - what a `.ckpt` is, byte by byte: a zip, a pickle, tensors; and why reading one may run a program;
# - which of its names are weights, and what the others are: the schedule, the running means, the places of the tokens;
# - what goes wrong, without any error, if names are translated by hand or loaded with `strict=False`;
# - how to find the layer in which two networks part, on faults that we plant ourselves;
# - the CompVis source, file by file, in the order in which a reader meets it: its equations, where each stands here,
#   what in it is dead, and what in it is odd.
#
# About an hour and a half to read; it runs in about a minute on a laptop. The modules of this stage are
# [`minisd/checkpoint/`](../minisd/checkpoint/__init__.py) and
# [`minisd/instruments/comparison.py`](../minisd/instruments/comparison.py). The page
# [`docs/checkpoint.md`](../docs/checkpoint.md) has the commands. Before this:
# [notebook 08](08_training.ipynb), on training at full scale.
#
# **No file of Stable Diffusion is needed.** Without one, the notebook makes a small file in the same layout, from the
# model that ships. If you have one, put its path below (`.ckpt` or `.safetensors`), or the folder or hub name of a
# model in diffusers' layout. With it, draw on a GPU, or have patience: 512×512 pixels take minutes on a CPU.
#
# The [guided tour](../docs/play.md#tour=overview) in your browser names, at each of its stops, the class or method of
# CompVis that does the same.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing
CHECKPOINT = None  # "v1-5-pruned.ckpt", say: a path, or "owner/name" on the Hugging Face hub

# %%
import contextlib
import copy
import importlib
import inspect
import pickle
import pickletools
import sys
import tempfile
import textwrap
import time
import types
import zipfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import minisd
from minisd import attention, viz
from minisd.checkpoint import compvis, diffusers, read_weights

full = MODE == "full"
start = time.time()


def say(text):
    """Print a long sentence in lines, without the name of this run's folder."""
    print(textwrap.fill(str(text).replace(str(folder), "…"), 112, subsequent_indent="    "))


work = tempfile.TemporaryDirectory()
folder = Path(work.name)

# %% [markdown]
# ## A file to look into
#
# The official files were written by PyTorch Lightning, the library that CompVis trained with. We write one as it would,
# from the model that ships. It holds what the official ones hold:
#
# - `state_dict`: the weights, and more (below);
# - beside it what Lightning wants to remember: an epoch, a step, its version, the state of its callbacks. A callback is
#   an object that is called at each step, to save or to draw. Lightning files its state **under its class**. So there
#   is a class in the file, and we shall see what that means.
#
# One thing we have to make up. The weights that ship are running means over training (EMA, notebook 07). The weights
# "of the last step", from before they were averaged, were not kept. In their place we take the means plus a little
# noise.


# %%
def official(sd, path):
    """Write a model as Lightning would have written CompVis's: with EMA, schedule, and a class of Lightning's."""
    g = torch.Generator().manual_seed(0)
    state = compvis.as_compvis(sd)  # the weights, the schedule's buffers, position_ids
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        mean = state[name].clone()
        state["model_ema." + name.removeprefix("model.").replace(".", "")] = mean
        rough = mean.std() if mean.numel() > 1 else mean.abs()
        state[name] = mean + 0.2 * rough * torch.randn(mean.shape, generator=g)
    state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(11_000)

    module = "pytorch_lightning.callbacks.model_checkpoint"  # need not be installed: an empty stand-in for a moment
    callback = type("ModelCheckpoint", (), {"__module__": module})
    stand_ins = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module)}
    stand_ins[module].ModelCheckpoint = callback
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    content = {"epoch": 142, "global_step": 11_000, "pytorch-lightning_version": "1.4.2", "state_dict": state}
    torch.save(content | {"callbacks": {callback: {"monitor": "val/loss_simple_ema"}}, "lr_schedulers": []}, path)
    for name, was in before.items():
        sys.modules.pop(name) if was is None else sys.modules.update({name: was})


emoji = minisd.load(device="cpu")
minisd.save(emoji, folder / "emoji.safetensors")  # for the YAML and the tokenizer, which it leaves beside the file
official(emoji, folder / "emoji.ckpt")

given = CHECKPOINT is not None and Path(CHECKPOINT).is_file()
file = Path(CHECKPOINT) if given else folder / "emoji.ckpt"
print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, {'a zip' if zipfile.is_zipfile(file) else 'no zip'}")

# %% [markdown]
# ## It is a zip
#
# Since PyTorch 1.6, `torch.save` writes an ordinary zip, without compression. (Older files are one
# long pickle, and a `.safetensors` is neither.)

# %%
if zipfile.is_zipfile(file):
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        program = archive.read(next(entry for entry in entries if entry.filename.endswith("data.pkl")))
    for entry in [*entries[:6], None, *entries[-3:]]:
        print(f"    {entry.filename:24} {entry.file_size:12,} bytes" if entry else "    …")
    tensors = [entry for entry in entries if "/data/" in entry.filename]
    size = sum(entry.file_size for entry in tensors)
    print(f"{len(tensors)} files of bare numbers, {size / 1e6:.1f} MB, and data.pkl, {len(program) / 1e6:.2f} MB")
else:
    print("no zip, so there is nothing to see here: look with CHECKPOINT = None")

# %% [markdown]
# Nearly all of it is bare numbers, one entry for each tensor. `data.pkl` says what they are: their names, shapes and
# kinds. That is the interesting part, and the dangerous one.
#
# ## A pickle is a program
#
# `pickle` is Python's way to write objects down. It does not describe them, as JSON does. It writes a **program** for a
# small machine with a stack, which builds them when it is run. Here are its first instructions, and those that fetch
# something by its name from a Python module:

# %%
if zipfile.is_zipfile(file):
    operations = list(pickletools.genops(program))
    print(f"{len(operations):,} instructions. The first:", " ".join(code.name for code, *_ in operations[:14]), "…")
    fetched = Counter(argument for code, argument, _ in operations if code.name == "GLOBAL")
    print("What it asks Python for:", *(name.replace(" ", ".") for name in fetched), sep="\n    ")

# %% [markdown]
# `torch._utils._rebuild_tensor_v2` builds a tensor around the numbers of an entry. `OrderedDict` is harmless. But the
# machine has an instruction, REDUCE, that **calls** what was fetched, with any arguments. Nothing in the format keeps a
# file from fetching something else.
#
# **Predict, then run.** Below is a pickle that holds a model of one number. What else happens on `pickle.loads`? Is
# anything printed? Could you have seen it from the result?

# %%
class Innocent:
    def __reduce__(self):  # what pickle writes down in place of the object: call this, with these arguments
        return exec, (f"import pathlib; pathlib.Path({str(folder / 'I was here')!r}).mkdir()",)


trap = {"state_dict": {"weight": torch.ones(1)}, "note": Innocent()}
result = pickle.loads(pickle.dumps(trap))
print("the result:", result, "; a folder more on the disk:", (folder / "I was here").exists())

(folder / "I was here").rmdir()
torch.save(trap, folder / "trap.ckpt")
try:
    minisd.load(folder / "trap.ckpt")
except minisd.CheckpointError as error:
    say(f"minisd: {error}")
print("a folder more on the disk:", (folder / "I was here").exists())

# %% [markdown]
# <details><summary>Answer</summary>
#
# The program ran: a folder was made. It could as well have sent your files away. The result shows a `None` where the
# object was, and only somebody who looks for it would see that. A file of weights that somebody put on the web is a
# program that somebody put on the web.
#
# </details>
#
# `torch.load(…, weights_only=True)` runs the same machine with a short list of what may be fetched: tensors and plain
# containers. Everything else ends in an error, before it is called. minisd always reads so. CompVis's scripts, of 2022,
# say `torch.load(ckpt, map_location="cpu")`, and that ran anything in the PyTorch of the time.
#
# And the official files? They name a class of Lightning's, `ModelCheckpoint`, which is not on the list.

# %%
try:
    torch.load(folder / "emoji.ckpt", map_location="cpu", weights_only=True)
except pickle.UnpicklingError as error:
    reason = next(line.strip() for line in str(error).splitlines() if "GLOBAL" in line)
    say("torch:  " + reason.partition(". Please use")[0])

state = read_weights(file)  # {name: tensor}
print(f"minisd:  {len(state)} tensors, the first is {next(iter(state))}")

# %% [markdown]
# minisd does not fetch that class either. Where a file asks for something of Lightning's, it gets a stand-in, that
# makes an empty dictionary and can do nothing (`Inert` in [`files.py`](../minisd/checkpoint/files.py)). What else a
# file asks for is refused, by its name, as above.
#
# A `.safetensors` has none of this: eight bytes give the length of a header, the header is JSON with names, shapes and
# places, then come the numbers. Take that where you have the choice.
#
# ## The names
#
# A `state_dict` is flat. The path through the modules is in the name.

# %%
def part(name):
    for prefix in ("model.diffusion_model", "first_stage_model", "cond_stage_model", "model_ema"):
        if name.startswith(prefix) and not name.endswith("position_ids"):
            return prefix
    return "neither: schedule, position_ids"


with torch.device("meta"):  # shapes without memory
    v1 = minisd.LatentDiffusion(minisd.PRESETS["sd-v1"], minisd.BPETokenizer.clip())
    names_v1 = compvis.as_compvis(v1)

parts = list(dict.fromkeys([*map(part, state), *map(part, names_v1)]))
print(f"{'':34}{file.name[:24]:^34}{'Stable Diffusion v1':^34}")
print(f"{'':34}" + f"{'tensors':>10}{'numbers':>14}{'MB':>10}" * 2)
for kind in parts:
    cells = ""
    for table in (state, names_v1):
        chosen = [tensor for name, tensor in table.items() if part(name) == kind]
        numbers = sum(tensor.numel() for tensor in chosen)
        megabytes = sum(tensor.numel() * tensor.element_size() for tensor in chosen) / 1e6
        cells += f"{len(chosen):10,}{numbers:14,}{megabytes:10,.1f}" if chosen else " " * 34
    print(f"{kind:34}{cells}".rstrip())

# %% [markdown]
# The right half was counted on a model without memory. In it are the famous figures: a UNet of **859.5 million**
# numbers, a VAE of **83.7 million**, a text encoder of **123.1 million**. In float32 that is 3.44 + 0.33 + 0.49 = 4.27
# GB, which is the size of the smaller download. With the running means of the UNet come 3.44 GB more: 7.7 GB, the
# larger one.
#
# Where in the file is what? Add up the numbers in the order of the names.

# %%
weights = v1.state_dict()
gigabytes = torch.tensor([tensor.numel() * 4e-9 for tensor in weights.values()]).cumsum(0)
lines = {}
for prefix, label in {"model.": "UNet", "first_stage_model.": "VAE", "cond_stage_model.": "text"}.items():
    n = [i for i, name in enumerate(weights) if name.startswith(prefix)]
    lines[label] = (n, gigabytes[n])
by_block = Counter()
for name, tensor in v1.model.diffusion_model.state_dict().items():
    place = name.split(".")
    by_block[".".join(place[:2]) if place[0].endswith("blocks") else place[0]] += tensor.numel() / 1e6
blocks = {"UNet": (range(len(by_block)), list(by_block.values()))}
titles = ["GB up to the n-th tensor", "millions of numbers in the n-th block of the UNet"]
viz.curves(dict(zip(titles, (lines, blocks), strict=True)), xlabel="n", width=4.2)

# %% [markdown]
# Left: the UNet has the first 686 tensors and four fifths of the file. It rises in jumps: few tensors are large. (The
# jump before the text encoder is its table of 49,408 tokens.) Right, the blocks in the order in which they run:
# `time_embed`, 12 on the way down, the middle, 12 on the way up, `out`. The largest is the middle one. It and its
# neighbours have 1,280 channels, and on the way up those that are joined on besides (notebook 03). The first and last
# blocks, on full-size maps, are small.
#
# Some names, by their shapes. All of them are names of minisd's modules, too:

# %%
shown = [
    "model.diffusion_model.time_embed.0.weight",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
    "model.diffusion_model.out.2.weight",
    "first_stage_model.encoder.down.0.block.0.norm1.weight",
    "first_stage_model.decoder.mid.attn_1.q.weight",
    "first_stage_model.quant_conv.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
]
for name in shown:
    print(f"{name:82}{list(names_v1[name].shape)}")

# %% [markdown]
# **Predict, then run.** From these shapes alone: how wide is the context, and how many numbers does the encoder put out
# for each pixel of the latent, before `quant_conv` and after? Why is `ff.net.0.proj` of size 10,240?
#
# <details><summary>Answer</summary>
#
# `attn2.to_k` takes 768 in: the width of the context. `quant_conv` is [8, 8, 1, 1]: 8 numbers in and 8 out, mean and
# log variance of 4 channels. 10,240 = 2 · 4 · 1,280: the feed-forward widens by four, and GEGLU needs two halves, value
# and gate.
#
# </details>
#
# ## What is not a weight
#
# **The schedule.** CompVis keeps β, ᾱ and what follows from them as buffers of the module, so that they move to the GPU
# with it. So they are saved with it. They add nothing, since they follow from three numbers of the YAML. But they
# are a check: weights that were trained with another noise would draw rubbish.

# %%
sd = minisd.load(CHECKPOINT or file, config=None if CHECKPOINT else folder / "emoji.yaml", use_ema=None)
print(f"{'buffer':34}{'shape':10}{'first':>12}{'last':>12}    differs from ours by")
for name, ours in compvis.schedule_buffers(sd.schedule).items():
    theirs = state.get(name)
    if theirs is not None:
        worst = (theirs.float() - ours).abs().max().item()
        print(f"{name:34}{list(theirs.shape)!s:10}{theirs[0]:12.5g}{theirs[-1]:12.5g}    {worst:.0e}")

wrong = (folder / "emoji.yaml").read_text().replace("beta_schedule: linear", "beta_schedule: sqrt_linear")
(folder / "wrong.yaml").write_text(wrong)
try:
    minisd.load(folder / "emoji.ckpt", config=folder / "wrong.yaml", tokenizer=folder / "emoji.clip")
except minisd.CheckpointError as error:
    say(error)

# %% [markdown]
# (That the differences are 0 says little here: we wrote the file ourselves. The tests compare ours with numbers
# recorded from CompVis's code.) At the end we changed one word of the YAML, and the file itself protested. (Both
# schedules begin and end alike. The figure at station 2 below shows how they differ.)
#
# **`position_ids`** is 0, 1, 2, …, 76. The text tower of transformers kept it as a buffer until 2023; then it left the
# state_dict. (Files from before have a name too many for a newer transformers, and files from after one too few for an
# older one.) minisd counts for itself.
#
# **The running means**, `model_ema.…`. There the names look odd.

# %%
ema = [name for name in state if name.startswith("model_ema.")]
for name in [name for name in ema if "transformer_blocks" in name][:4]:
    print("   ", name)
flat = [name.replace(".", "") for name in names_v1 if name.startswith("model.diffusion_model.")]
print(f"SD v1's {len(flat)} names of the UNet without their dots: {len(set(flat))} different ones")

# %% [markdown]
# The dots are gone. PyTorch allows none in the name of a buffer, so `LitEma` deletes them.
#
# **Predict, then run.** Can one put the dots back? Take a name that goes on `input_blocks111…`. And how does one load
# the means then?
#
# <details><summary>Answer</summary>
#
# Not from the name alone: that could be `input_blocks.1.1.1…`, `input_blocks.11.1…` or `input_blocks.1.11…`. But one
# need not. Go through the names of the UNet, delete *their* dots, and look up what comes out. This works as long as no
# two names become the same, and the line above says that none of the 686 do. That is `ema_names` in
# [`compvis.py`](../minisd/checkpoint/compvis.py).
#
# </details>
#
# Does it matter which of the two one draws with? Here, the same prompt and seed from both halves of our file.

# %%
few = {"steps": 25 if full else 2, "guidance_scale": 4.0, "sampler": "dpmpp_2m", "seed": 0}
prompts = ["fox, noto style", "panda, noto style", "rocket, noto style", "sunflower, noto style", "house, noto style"]
prompts = prompts if full else prompts[:2]
small = {"config": folder / "emoji.yaml", "device": "cpu"}
rough = minisd.load(folder / "emoji.ckpt", **small, use_ema=False)
means = minisd.load(folder / "emoji.ckpt", **small, use_ema=True)
rows = [model.txt2img(prompts, **few).pictures for model in (emoji, means, rough)]
difference = (rows[0] - rows[1]).abs().max().item()
print(f"the model that ships, and the means of the .ckpt: largest difference of a picture {difference:.1g}")
assert difference < 1e-3
viz.strip(rows, [p.split(",")[0] for p in prompts], ["ships", "use_ema=True", "use_ema=False"])

# %% [markdown]
# The first two rows are the same model, once from a folder of minisd and once from the `.ckpt`. The third has the rough
# weights. (How rough was our choice. How much it is in Stable Diffusion, a file with both would show. For drawing one
# takes the means. A file with both is meant for training further.)
#
# The official files that are called "EMA-only" hold the means *under the names of the UNet*, and no `model_ema`. So
# `use_ema: False` in CompVis's YAML does not say that the weights are no means. It says that there is nothing to swap
# in.

# %%
if CHECKPOINT:
    drawn = sd.txt2img("a photograph of an astronaut riding a horse", steps=25 if full else 1, seed=42).pictures
    print(f"{CHECKPOINT}: {list(drawn.shape)}")
    viz.strip([drawn.cpu()], size=4)

# %% [markdown]
# ## The YAML beside it
#
# Weights do not say how they are to be put together: how many heads, which schedule, which scale factor. CompVis keeps
# that in a YAML file (for v1: `v1-inference.yaml`), with a simple scheme. `target` is the path of a class, `params` are
# the arguments of its constructor, and these may be such pairs again. This is ours, without the networks' own numbers:

# %%
for line in (folder / "emoji.yaml").read_text().splitlines():
    depth = len(line) - len(line.lstrip())
    if depth <= 4 or (depth == 6 and "target" in line):
        print(line)

# %% [markdown]
# CompVis imports whatever class is named there and calls it (`instantiate_from_config`). That is handy, and a YAML from
# the web is then a program, too. minisd knows a list of targets, takes their numbers into a config of its own, and
# refuses others by name. A `.ckpt` without a YAML is taken for Stable Diffusion v1, if its shapes are.
#
# Note what is *not* there: the tokenizer. In CompVis it comes with transformers, under the name of a CLIP model on the
# hub. In minisd that of Stable Diffusion ships; ours is in a folder beside the file, which `version` names.
#
# ## Strictly
#
# minisd's modules have the names of the file. So nothing is translated, and loading can be *strict*: each name of the
# model is in the file with the right shape, and each name of the file is in the model or is one of those above.
#
# PyTorch has a switch for the impatient, `strict=False`. Then what does not fit is skipped. CompVis's scripts load
# so, and print what was missing only if asked to (`verbose`). Here is one typing error in one name.

# %%
victim = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_out.0.weight"
typo = emoji.state_dict()
typo[victim.replace("attn1", "atn1")] = typo.pop(victim)
torch.manual_seed(0)
lenient = minisd.LatentDiffusion(emoji.config, emoji.cond_stage_model.tokenizer).eval()  # fresh: all weights random
lenient.scale_factor = emoji.scale_factor
missing, unexpected = lenient.load_state_dict(typo, strict=False)
print(f"strict=False: of {len(typo)} names, {len(missing)} missing, {len(unexpected)} unexpected, and no error")
torch.save({"state_dict": typo}, folder / "typo.ckpt")
try:
    minisd.load(folder / "typo.ckpt", **small)
except minisd.CheckpointError as error:
    say("minisd: " + str(error).partition(". By its names")[0])

# %% [markdown]
# ## What a converter can get wrong
#
# The other way is a converter: a script that translates the names of one library to those of another. It must
# know some 1,100 names. Where two tensors have the same shape, nothing tells it that it has swapped them.
#
# Let us make such mistakes, each in the whole model. All shapes fit, and the first four load strictly.
#
# - `to_k` and `to_v` of the cross-attention, swapped;
# - the two halves of GEGLU, swapped (a library may have the gate first);
# - `norm1` and `norm3` of each transformer block, swapped;
# - q and k of the VAE's attention, swapped;
# - and the typing error from above.
#
# **Predict, then run.** Which are seen at once, and which not at all?


# %%
def swapped(sd, one, other):
    """A copy in which each tensor that has `one` in its name, and its sibling with `other` there, changed places."""
    new = copy.deepcopy(sd)
    old = sd.state_dict()
    pairs = {name: name.replace(one, other) for name in old if one in name}
    assert pairs
    new.load_state_dict(old | {a: old[b] for a, b in pairs.items()} | {b: old[a] for a, b in pairs.items()})
    return new


def gate_first(sd):
    new = copy.deepcopy(sd)
    for module in new.modules():
        if isinstance(module, attention.GEGLU):
            for parameter in module.proj.parameters():
                parameter.data = parameter.roll(len(parameter) // 2, 0)  # the halves of the output
    return new


models = {
    "right": emoji,
    "to_k ↔ to_v": swapped(emoji, "attn2.to_k", "attn2.to_v"),
    "GEGLU's halves": gate_first(emoji),
    "norm1 ↔ norm3": swapped(emoji, "transformer_blocks.0.norm1", "transformer_blocks.0.norm3"),
    "the VAE's q ↔ k": swapped(emoji, "attn_1.q.", "attn_1.k."),
    "one name missing": lenient,
}
rows = [model.txt2img(prompts, **few).pictures for model in models.values()]
notes = [[f"differs by {(a - b).abs().mean():.3f}" for a, b in zip(row, rows[0], strict=True)] for row in rows]
viz.strip(rows, [p.split(",")[0] for p in prompts], list(models), notes)

# %% [markdown]
# <details><summary>Answer</summary>
#
# The first two are seen at once: with keys for values, or with the gate for the value, what is drawn has nothing to do
# with the prompt. With two norms swapped, one sees a fox, a panda, a rocket. If one did not have the first row, one
# would think: "not well trained". And the last two are as good as invisible. The VAE looks at itself with questions and
# answers swapped, and differs by 0.02 or 0.03, where values go from −1 to 1. One layer of the UNet has random numbers
# in place of its weights, and nobody would know.
#
# </details>
#
#
# So a converter is tested with numbers, not with pictures. How, comes next.
#
# ## Equal, layer by layer
#
# diffusers is another implementation of the same networks, by other people. If both compute the same, both are probably
# right. `minisd.save(…, layout="diffusers")` writes a folder that diffusers reads. `minisd.compare` runs both networks
# on the same input, pairs their layers, and compares what comes out of each.
#
# (diffusers is not needed by minisd. If it is not installed, these cells compare the network with a copy of itself.
# `pip install diffusers` brings it.)

# %%
minisd.save(emoji, folder / "emoji for diffusers", layout="diffusers")
unet, vae, text = emoji.model.diffusion_model, emoji.first_stage_model, emoji.cond_stage_model.transformer
theirs = {"unet": copy.deepcopy(unet), "vae": copy.deepcopy(vae), "text_encoder": copy.deepcopy(text)}
with contextlib.suppress(ImportError):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    theirs = {name: kind.from_pretrained(folder / "emoji for diffusers" / name) for name, kind in kinds.items()}

g = torch.Generator().manual_seed(0)
x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([100, 900])
context = emoji.get_learned_conditioning(["fox, noto style", "panda, noto style"])  # [2 24 192]
picture = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
ids = emoji.cond_stage_model.tokenize(["fox, noto style", "a red heart"])  # [2 24]

comparisons = {
    "UNet": minisd.compare(unet, theirs["unet"].eval(), (x, t, context)),
    "VAE, encode": minisd.compare(vae.encode, theirs["vae"].eval().encode, picture),
    "VAE, decode": minisd.compare(vae.decode, theirs["vae"].decode, x),
    "text": minisd.compare(text, theirs["text_encoder"].eval(), ids),
}
print(comparisons["UNet"])

# %% [markdown]
# Each row is a pair: our layer, which has CompVis's name, and theirs. In the UNet all names differ, and so does the
# numbering: CompVis counts blocks through, diffusers counts by level and kind. The same for all four:

# %%
print(f"{'':14}{'pairs':>6}{'agree':>7}{'largest difference':>20}{'of':>8}    in")
for name, comparison in comparisons.items():
    worst = max(comparison.rows, key=lambda row: row.difference)
    agree = sum(row.verdict == "agree" for row in comparison.rows)
    print(f"{name:14}{len(comparison.rows):6}{agree:7}{worst.difference:20.1e}{worst.size:8.2f}    {worst.ours}")
    assert comparison.equal

# %% [markdown]
# Zero means: the same operations in the same order, to the last bit. Where it is not zero, the sums were added up in
# another order. In the tests, this is done with random weights in all layers, since trained or fresh ones may be zero
# somewhere and hide what is before them.
#
# ## Find the fault
#
# Now the other case: somebody wrote a UNet, it runs, the shapes are right, and the pictures are bad. Three faults that
# people do make:
#
# - **gate first** in GEGLU: `x, gate` taken the wrong way round, in the code;
# - **eps**: GroupNorm's small number under the root, $(x - \mu) / \sqrt{\sigma^2 + \mathrm{eps}}$. The transformers
#   have 1e-6, PyTorch's default is 1e-5;
# - **eps, larger**: 1e-3, which is TensorFlow's default.
#
# **Predict, then run.** In which layer does each show first? How large is it there, and how large at the output? Is
# one of them invisible?


# %%
class GateFirst(attention.GEGLU):
    def forward(self, x):
        gate, x = self.proj(x).chunk(2, dim=-1)  # the wrong way round
        return x * F.gelu(gate)


def with_gate_first(network):
    for module in network.modules():
        if type(module) is attention.GEGLU:
            module.__class__ = GateFirst


def with_eps(eps):
    def plant(network):
        for module in network.modules():
            if isinstance(module, attention.SpatialTransformer):
                module.norm.eps = eps

    return plant


faults = {"gate first": with_gate_first, "eps 1e-5": with_eps(1e-5), "eps 1e-3": with_eps(1e-3)}
found = {}
for name, plant in faults.items():
    network = copy.deepcopy(unet)
    plant(network)
    found[name] = minisd.compare(network, unet, (x, t, context))

print(found["gate first"])

# %%
for name in ("eps 1e-5", "eps 1e-3"):
    comparison = found[name]
    say(f"{name}: {comparison.conclusion}")
    for hint in comparison.hints[:1]:
        say(f"  - {hint}")

panels = {"difference of each layer, relative": {}}
for name, comparison in found.items():
    relative = [max(row.relative, 1e-9) for row in comparison.rows if row.difference >= 0]
    panels["difference of each layer, relative"][name] = (range(len(relative)), relative)
viz.curves(panels, xlabel="layer, in the order in which they run", log=list(panels), width=6.5, height=2.8)

# %% [markdown]
# (What is exactly equal is drawn at 1e-9.) Up to the first transformer, all is exactly equal. There the curves leave
# the floor, and what comes after differs *because of it*. So the first one is the place to look. The notches, where all
# curves fall back to the floor, are layers that do not look at the picture at all: `emb_layers` see only the time, and
# `to_k` and `to_v` of the cross-attention only the text.
#
# - **gate first**: the Linear layer `ff.net.0.proj` agrees and the next one, `ff.net.2`, does not, and its *input*
#   differs already. Nine tenths of the largest number are wrong there, and three tenths at the output. So the fault is
#   between them, where there is no module: in GEGLU's own line. `compare` tries a few such operations, and names the
#   one that fits.
# - **eps 1e-3**: the norm itself differs, and its input agrees. Its weights agree, too, so it is its settings. It is
#   6e-4 of the largest number there, and less than a tenth of that at the output. In the five pictures above it would
#   change no number by more than 0.002, a quarter of a step of 255: nobody would see it.
# - **eps 1e-5** changes numbers of size 3 in the sixth digit. It is below any sensible tolerance.
#   `compare` names it all the same, since it looks at the settings as well. It *can* be large: where the variance of a
#   group is small, eps is no longer small beside it.
#
# Such silent faults are why these tests exist. CompVis itself uses 1e-5 in the ResBlocks (`GroupNorm32`, PyTorch's
# default) and 1e-6 in the transformers and the VAE (`Normalize`).

# %%
def norm(x, eps):
    return F.group_norm(x, 32, eps=eps)


print("size of the input, and how much 1e-5 in place of 1e-6 changes the output (of size about 3):")
for size in (1, 0.1, 0.01, 0.001):
    h = size * torch.randn(1, 192, 4, 4, generator=g)
    print(f"{size:10}{(norm(h, 1e-5) - norm(h, 1e-6)).abs().max().item():12.1e}")

# %% [markdown]
# ## Three layouts
#
# The same tensor, as each library calls it. minisd has CompVis's name, less the prefix of the part.

# %%
unet_names, vae_names = diffusers.unet_names(v1.model.diffusion_model), diffusers.vae_names(v1.first_stage_model)
chosen = ["input_blocks.1.0.in_layers.0.weight", "input_blocks.1.0.emb_layers.1.weight", "input_blocks.3.0.op.weight",
          "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", "middle_block.1.proj_in.weight",
          "output_blocks.5.2.conv.weight", "out.2.weight"]  # fmt: skip
for name in chosen:
    print(f"unet   {name:58}{unet_names[name]}")
for name in ["encoder.down.1.block.0.nin_shortcut.weight", "decoder.up.0.block.0.conv1.weight",
             "decoder.mid.attn_1.q.weight"]:  # fmt: skip
    print(f"vae    {name:58}{vae_names[name]}")
same = sum(a == b for names in (unet_names, vae_names) for a, b in names.items())
print(f"{same} of {len(unet_names) + len(vae_names)} names are the same in both")

# %% [markdown]
# Two traps for converters. The VAE's `decoder.up.0` is the *last* to run in CompVis (it is numbered by resolution), and
# diffusers' `up_blocks.0` the first. And CompVis's attention of the VAE projects by 1×1 convolutions, [512, 512, 1, 1],
# where diffusers has Linear layers, [512, 512].
#
# The way round, through all three:

# %%
reference = emoji.state_dict()
now = emoji
for layout, target in {"diffusers": "a", "compvis": "b.ckpt", "minisd": "c"}.items():
    minisd.save(now, folder / target, layout=layout)
    yaml = (folder / target).with_suffix(".yaml")
    now = minisd.load(folder / target, device="cpu", config=yaml if layout == "compvis" else None)
    changed = sum(not torch.equal(tensor, reference[name]) for name, tensor in now.state_dict().items())
    print(f"saved as {layout:10} and loaded again: {changed} of {len(reference)} tensors changed")

# %% [markdown]
# ## How to read the CompVis source
#
# The rest of this notebook is a walk through [CompVis/stable-diffusion](https://github.com/CompVis/stable-diffusion),
# best read with that source beside it. It grew out of four others: OpenAI's improved- and guided-diffusion (the UNet,
# and much of the notation), lucidrains' denoising-diffusion-pytorch (`DDPM`), and CompVis's own taming-transformers
# (the autoencoder). So one equation may stand there three times, in three styles.
#
# Start where the user starts, and go inwards:
#
#     scripts/txt2img.py ─► LatentDiffusion (ddpm.py) ─► DiffusionWrapper ─► UNetModel (openaimodel.py) ─► attention.py
#                        │            ├─► AutoencoderKL (autoencoder.py) ─► Encoder, Decoder (model.py)
#                        │            └─► FrozenCLIPEmbedder (encoders/modules.py)
#                        └─► DDIMSampler, PLMSSampler (ddim.py, plms.py)
#     main.py ─► Lightning's Trainer ─► LatentDiffusion.training_step; losses in ldm/modules/losses/

# %%
viz.class_diagram()

# %% [markdown]
# Each station below is a table: where it stands there, what it says, and the line here that says the same. The lines
# are looked up as the cell runs, so they are those of the code you have. Line numbers would be out of date soon, so
# lines are named by what is in them: search for them.
#
# The source is under CreativeML's licence, ours under MIT; what is theirs is told in our words. We read it in the
# versions that public archives keep; where yours differs, believe yours.



# %%
def reading(*lines):
    """A table of (where there, what it says, where here, what is in our line): finds the line, or raises."""
    for there, says, here, piece in lines:
        module, *path = here.split(".")
        thing = importlib.import_module(f"minisd.{module.replace('/', '.')}")
        for name in path:
            thing = getattr(thing, name)
        source = inspect.getsource(inspect.unwrap(thing)).splitlines()
        line = next((line.strip() for line in source if piece in line), None)
        if line is None:
            raise LookupError(f"minisd/{module}.py: {'.'.join(path)} has no line with {piece!r} any more")
        line = line if len(line) <= 104 else f"{line[:103]}…"
        print(textwrap.fill(f"there  {there}  |  {says}", 112, subsequent_indent=" " * 7))
        print(f"here   minisd/{module}.py: {'.'.join(path)}\n       {line}\n")


# %% [markdown]
# ### Station 1: `scripts/txt2img.py`
#
# Read `main` from its end. What is left after the options, the grid of pictures, the watermark and the safety checker
# is a dozen lines.

# %%
reading(
    ("load_model_from_config", "torch.load, then load_state_dict(…, strict=False): names that don't fit are skipped",
     "checkpoint/files.load_weights", "check_names("),
    ("instantiate_from_config (ldm/util.py)", "the YAML's `target` is imported and called with `params`: any class",
     "checkpoint/compvis._one_of", "if kind not in known"),
    ("main: --plms, else DDIM", "the sampler is an object that holds the model",
     "latent_diffusion._sampler", "return sampling.SAMPLERS[sampler]"),
    ("main: start_code, x_T", "noise [n 4 H/8 W/8]; one for all pictures with --fixed_code",
     "latent_diffusion.LatentDiffusion.sample", "randn((len(prompts)"),
    ("main: ema_scope", "draw with the running means, if the model keeps some; v1's YAML says it keeps none",
     "checkpoint/compvis.ema_names", "means = {"),
    ("main: uc", "the context of batch_size empty prompts, unless scale is 1",
     "latent_diffusion.LatentDiffusion._eps_model", "negative = self.cond_stage_model.unconditional"),
    ("main: c", "the context of the prompts",
     "latent_diffusion.LatentDiffusion._eps_model", "context = self.get_learned_conditioning(prompts)"),
    ("main: shape", "C, H / f, W / f, from the command line, and not from the model",
     "latent_diffusion.LatentDiffusion.latent_shape", "height // f, width // f"),
    ("main: sampler.sample(S, conditioning, …)", "50 steps, scale 7.5, eta 0",
     "latent_diffusion.LatentDiffusion.sample", "return draw(eps_model"),
    ("main: decode_first_stage", "latents to pictures",
     "latent_diffusion.LatentDiffusion.decode_first_stage", "z / self.scale_factor"),
    ("main: clamp((x + 1) / 2, 0, 1)", "from [-1, 1] to [0, 1]",
     "pictures.to_pil", "clamp(-1, 1) + 1"),
)  # fmt: skip

# %% [markdown]
# **Oddities.** The precision is `autocast` to float16 by default, so that even the same seed gives other pictures than
# in float32. `seed_everything` seeds the whole process, once: picture 5 of a run depends on how many came before it.
# Here, picture $k$ has seed + $k$. With `--plms`, `--ddim_eta` must stay 0.
#
# `scripts/img2img.py` differs in the middle only: `encode_first_stage`, `stochastic_encode` up to step `t_enc`, and
# `decode` from there.

# %%
reading(
    ("img2img.py, main: t_enc = int(strength · steps)", "how many steps are made",
     "sampling.remaining_timesteps", "left = int(strength * steps)"),
    ("DDIMSampler.stochastic_encode",
     "√ᾱ z + √(1-ᾱ) ε, with the ᾱ of index t_enc: one step noisier than decode expects",
     "latent_diffusion.LatentDiffusion._remaining", "noise_ahead and ahead"),
    ("DDIMSampler.decode", "p_sample_ddim for the first t_enc timesteps, from the largest down",
     "latent_diffusion.LatentDiffusion.img2img", 'timesteps=left'),
)  # fmt: skip

# %% [markdown]
# ### Station 2: `ldm/models/diffusion/ddpm.py`, the class `DDPM`
#
# Some 1,400 lines, the heart of it, and a "wild mixture", as it says of itself at the top. `DDPM` is a diffusion model
# on pixels. `LatentDiffusion` inherits from it and overrides nearly all that touches data. Begin with
# `register_schedule`.
#
# $$\bar\alpha_t = \prod_{s \le t} (1-\beta_s), \qquad
# x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$$

# %%
reading(
    ("make_beta_schedule (util.py)", '"linear": linspace between the roots, then squared',
     "noising.NoiseSchedule.scaled_linear", "return cls(roots**2)"),
    ("make_beta_schedule (util.py)", '"sqrt_linear": linspace, as it is',
     "noising.NoiseSchedule.linear", "torch.linspace"),
    ("DDPM.register_schedule", "ᾱ by cumprod, in float64 (NumPy), kept in float32",
     "noising.NoiseSchedule.__init__", "torch.cumprod"),
    ("DDPM.register_schedule", "ᾱ_prev: the same one place further, with a 1 before it",
     "noising.NoiseSchedule.__init__", "alphas_cumprod.new_ones(1)"),
    ("DDPM.register_schedule", "posterior_variance: (1-v) β̃_t + v β_t, and v_posterior is 0: so β̃_t",
     "noising.NoiseSchedule.__init__", "posterior_variance = (1 - alphas_cumprod_prev)"),
    ("DDPM.register_schedule", "posterior_log_variance_clipped: at t = 0, β̃ is 0, so not less than 1e-20",
     "noising.NoiseSchedule.__init__", "clamp(min=1e-20)"),
    ("DDPM.register_schedule", "posterior_mean_coef1, 2: the weights of x_0 and x_t in μ̃_t",
     "noising.NoiseSchedule.__init__", "coef1 = "),
    ("extract_into_tensor (util.py)", "a[t], reshaped to [b 1 1 1]",
     "noising.extract_into_tensor", "reshape(-1"),
    ("DDPM.q_sample", "√ᾱ_t x_0 + √(1-ᾱ_t) ε",
     "noising.NoiseSchedule.q_sample", "return signal * x_0"),
    ("DDPM.predict_start_from_noise", "x_0 = √(1/ᾱ_t) x_t - √(1/ᾱ_t - 1) ε",
     "noising.NoiseSchedule.predict_start_from_noise", "return recip * x_t"),
    ("DDPM.q_posterior", "μ̃_t, from x_0 and x_t",
     "noising.NoiseSchedule.q_posterior", "mean = coef1 * x_0"),
    ("DDPM.p_sample", "μ̃ + √β̃ z, and no noise where t = 0",
     "sampling.ddpm", "x_prev = mean + sqrt(variance)"),
    ("DDPM.p_mean_variance", "clamps x̂_0 to [-1, 1] if clip_denoised: right for pixels, off for latents",
     "sampling.ddpm", "x0 = x0.clamp(-1, 1)"),
    ("DDPM.p_losses, get_loss", "mean squared error per picture, then the mean",
     "loss.squared_error", ".square().reshape"),
    ("DDPM.forward", "t evenly from 0 … 999, one for each picture",
     "loss._loss", "torch.randint(0, schedule.timesteps"),
    ("DDPM.ema_scope", "swap in the means, and put the weights back whatever happens",
     "training/trainer.EMA.applied_to", "finally"),
)  # fmt: skip

# %% [markdown]
# **Oddities, and what is dead for Stable Diffusion v1.**
#
# - The schedule called `"linear"` is linear in $\sqrt\beta$; the one that is linear in $\beta$ is called
#   `"sqrt_linear"`. (There is a `"sqrt"`, too: the root of a line. Nothing uses it.)
# - `log_one_minus_alphas_cumprod` serves `q_mean_variance`, which serves `_prior_bpd`, which nothing in the file calls.
# - `v_posterior` mixes the two variances that the DDPM paper proposes. Its default, 0, is the smaller.
# - `lvlb_weights` weights the loss as the variational bound would. It is computed and logged in each step (`loss_vlb`),
#   then added times `original_elbo_weight`, which is 0. It is not in the checkpoint (`persistent=False`). Its first
#   value would be infinite, since β̃_0 = 0, and is replaced by the second.
# - In the branch for `x0`, `2. * 1 - torch.Tensor(alphas_cumprod)` is $2 - \bar\alpha$; by the neighbouring branch one
#   expects $2(1 - \bar\alpha)$: a slip of precedence. `x0` is not used by Stable Diffusion.
# - `logvar`, 1,000 zeros: with `learn_logvar` it would weigh the timesteps. The loss is divided by exp(0), plus 0. It
#   is a plain tensor, no buffer, and has to be moved to the device by hand.
# - The message for an unknown loss lacks its `f`: it would print `{loss_type}`.

# %%
schedules = {'"linear" there, scaled_linear here': minisd.NoiseSchedule.scaled_linear(0.00085, 0.012),
             '"sqrt_linear" there, linear here': minisd.NoiseSchedule.linear(0.00085, 0.012)}  # fmt: skip
beta = schedules['"linear" there, scaled_linear here']
b, a = beta.betas.double(), beta.alphas_cumprod.double()
weights = b**2 / (2 * beta.posterior_variance.double() * (1 - b) * (1 - a))
weights[0] = weights[1]
at = range(1000)
panels = {
    "β": {name: (at, schedule.betas) for name, schedule in schedules.items()},
    "lvlb_weights: what the bound would weigh the loss with": {"": (at, weights)},
}
share = weights[:50].sum() / weights.sum()
print(f"lvlb_weights: {weights[1]:.2f} at t = 1, {weights[400]:.4f} at t = 400; the first 50 have {share:.0%} of all")
viz.curves(panels, log=[list(panels)[1]], width=4.2)

# %% [markdown]
# On the right: the bound cares most for the first few timesteps, where there is next to no noise. Without these
# weights, all timesteps count alike, which DDPM found to draw better pictures (notebook 02).
#
# ### Station 3: `LatentDiffusion`, in the same file
#
# $$z = 0.18215 \cdot \mathcal E(x), \qquad
# L = \mathbb E_{z, c, \epsilon, t}\,\big\lVert \epsilon - \epsilon_\theta(z_t, t, \tau(c)) \big\rVert^2, \qquad
# \hat x = \mathcal D(z / 0.18215)$$
#
# $\mathcal E$ and $\mathcal D$ are encoder and decoder, $\tau$ the text encoder. This class is these three formulas,
# and what keeps $\mathcal E$, $\mathcal D$ and $\tau$ from being trained.

# %%
reading(
    ("LatentDiffusion.instantiate_first_stage",
     "eval, no gradients, and `.train` replaced by a function that does nothing",
     "latent_diffusion.LatentDiffusion.__init__", "eval().requires_grad_(False)"),
    ("LatentDiffusion.instantiate_cond_stage", "the same for the text encoder, unless cond_stage_trainable",
     "clip.FrozenCLIPEmbedder.freeze", "requires_grad_(False)"),
    ("LatentDiffusion.get_learned_conditioning", "cond_stage_model.encode(prompts)",
     "latent_diffusion.LatentDiffusion.get_learned_conditioning", "self.cond_stage_model.encode(c)"),
    ("LatentDiffusion.get_first_stage_encoding", "scale_factor · (a sample of the posterior): 0.18215 z",
     "latent_diffusion.LatentDiffusion.get_first_stage_encoding", "return self.scale_factor *"),
    ("LatentDiffusion.on_train_batch_start", "scale_by_std: scale_factor = 1 / std of the first batch's latents",
     "training/vae.measure_scale_factor", "** -0.5"),
    ("LatentDiffusion.decode_first_stage", "z / scale_factor, then the decoder",
     "latent_diffusion.LatentDiffusion.decode_first_stage", "z / self.scale_factor"),
    ("LatentDiffusion.get_input", "batch[first_stage_key] → encoder → z; batch[cond_stage_key] → c",
     "training/unet.train_unet", "z = sd.get_first_stage_encoding("),
    ("LatentDiffusion.apply_model", "wraps cond into {c_crossattn: [cond]}, then self.model(x, t, **cond)",
     "latent_diffusion.LatentDiffusion.apply_model", "return self.model("),
    ("DiffusionWrapper.forward: 'crossattn'", "the contexts joined along the tokens, handed on as context=",
     "latent_diffusion.LatentDiffusion.apply_model", "torch.cat(list(part), dim=1)"),
    ("DiffusionWrapper.forward: 'concat', 'hybrid'", "further channels behind the noisy latent: inpainting",
     "latent_diffusion.DiffusionWrapper.forward", "torch.cat([x, c_concat], dim=1)"),
    ("LatentDiffusion.p_losses", "q_sample, apply_model, and |ε - ε̂|²",
     "latent_diffusion.LatentDiffusion.p_losses", "loss_target(self.config.parameterization"),
    ("LatentDiffusion.p_sample_loop", "all 1,000 steps; a mask is put back after each",
     "sampling._walk", "for i, t, a_t, a_prev"),
    ("LatentDiffusion.configure_optimizers", "AdamW over the UNet, the learning rate warmed up",
     "training/trainer._adamw", "torch.optim.AdamW"),
    ("on_train_batch_end → LitEma.forward (ema.py)",
     "decay min(0.9999, (1+n)/(10+n)); mean -= (1-decay)(mean - weight)",
     "training/trainer.EMA.update", "decay = min(self.decay"),
)  # fmt: skip

# %% [markdown]
# **Oddities, and what is dead.**
#
# - `first_stage_key: "jpg"` and `cond_stage_key: "txt"` are the names that a batch from a web data set has. In the
#   version of `get_input` that we read, texts are recognised by the keys `caption` and `coordinates_bbox`, and not
#   `txt`. The data set and the training YAML are missing, too: it seems that v1 was trained with more than what is
#   public.
# - `cond_stage_trainable: false   # Note: different from the one we trained before`, says the YAML. In the earlier
#   text-to-image model, the text encoder (a BERT) was trained together with the UNet.
# - `scale_by_std` makes `scale_factor` a buffer, so that it comes with the checkpoint. Without it, it is a number of
#   the YAML. minisd reads both.
# - `num_timesteps_cond` (with `cond_ids`, `shorten_cond_schedule`) would put noise on the context, too. It is 1: off.
# - Everything under `split_input_params`, more than two hundred lines with `fold` and `unfold`, draws large pictures in
#   overlapping patches. Nothing in the repository sets it for v1.
# - In `p_sample`, two lines stand behind a `raise DeprecationWarning`. They are never reached.
# - In `log_images`, "outpainting" takes the same mask as "inpainting", not its opposite (in the version that we read).
# - There is **no text dropout** in this code, though the model card says that 10% of the captions were dropped. Here it
#   is in `training/unet.py`:

# %%
reading(
    ("(nothing)", "10% of the captions are replaced by the empty one",
     "loss.text_dropout", "torch.where(drop"),
    ("(nothing)", "where it is called",
     "training/unet.train_unet", "context = text_dropout("),
)  # fmt: skip

# %% [markdown]
# ### Station 4: `ldm/modules/diffusionmodules/openaimodel.py`, the class `UNetModel`
#
# $$\mathrm{ResBlock}(x) = \mathrm{skip}(x) + \mathrm{conv}\big(\mathrm{SiLU}(\mathrm{norm}(
# \mathrm{conv}(\mathrm{SiLU}(\mathrm{norm}(x))) + W\,\mathrm{SiLU}(\mathrm{emb}(t))))\big)$$
#
# Read `forward` first: it is a dozen lines, and `__init__` can be understood from it.

# %%
reading(
    ("timestep_embedding (util.py)", "cosines, then sines, of t · 10000^(-i/half)",
     "unet.timestep_embedding", "angles.cos(), angles.sin()"),
    ("UNetModel.forward: emb", "two Linear layers with a SiLU between",
     "unet.UNetModel.forward", "emb = self.time_embed(emb)"),
    ("UNetModel.forward: hs.append(h)", "down; remember each",
     "unet.UNetModel.forward", "skips.append(h)"),
    ("UNetModel.forward: middle_block", "the bottom",
     "unet.UNetModel.forward", "self.middle_block(h, emb, context)"),
    ("UNetModel.forward: th.cat([h, hs.pop()])", "up; join what was remembered last",
     "unet.UNetModel.forward", "torch.cat([h, skips.pop()], dim=1)"),
    ("TimestepEmbedSequential.forward", "emb to who wants the time, context to who wants the text",
     "unet.TimestepEmbedSequential.forward", "isinstance(layer, SpatialTransformer)"),
    ("UNetModel.__init__: ds in attention_resolutions", "where there are transformers, by downsampling factor",
     "unet.UNetModel.__init__", "if downsampling in config.attention_resolutions"),
    ("UNetModel.__init__: input_block_chans.pop()", "how many channels are joined on",
     "unet.UNetModel.__init__", "skip_channels.pop()"),
    ("UNetModel.__init__: num_res_blocks + 1", "one block more on each level of the way up",
     "unet.UNetModel.__init__", "range(config.num_res_blocks + 1)"),
    ("UNetModel.__init__: out", "norm, SiLU, and a convolution that starts at zero",
     "unet.UNetModel.__init__", "zero_module(nn.Conv2d(channels, config.out_channels"),
    ("ResBlock._forward", "h + emb_out[..., None, None]: the same for all pixels",
     "unet.ResBlock.forward", "self.emb_layers(emb)"),
    ("ResBlock._forward", "skip_connection(x) + h",
     "unet.ResBlock.forward", "return self.skip_connection(x) + h"),
    ("Downsample, Upsample", "convolution of stride 2, padded all round; nearest pixel, then a convolution",
     "unet.Downsample.__init__", "stride=2, padding=1"),
    ("GroupNorm32 (util.py)", "32 groups, eps 1e-5, computed in float32",
     "unet.ResBlock.__init__", "nn.GroupNorm(32, channels)"),
)  # fmt: skip

# %% [markdown]
# **Oddities, and what is dead.**
#
# - `image_size: 32  # unused`. It is a required argument, and is kept and never read.
# - `attention_resolutions: [4, 2, 1]` are downsampling factors: attention on maps of 16, 32 and 64, not of 8. But the
#   middle block always has a transformer, so 8 has one as well.
# - `use_scale_shift_norm`, `resblock_updown`, `num_classes` (`label_emb`), `n_embed` (`id_predictor`), `dims` 1 and 3
#   belong to other models. minisd refuses a YAML that asks for them, by name.
# - `convert_to_fp16` applies functions that are replaced by `pass` at the top of the file.
# - `legacy: False` guards a line that decides the size of a head. With `use_spatial_transformer`, it comes to the same.
# - `num_heads` is overwritten inside the loop where `num_head_channels` is set. That is not so in v1: 8 heads
#   everywhere, of 40 channels on the first level, and 160 at the bottom.
#
# ### Station 5: `ldm/modules/attention.py`
#
# $$\mathrm{softmax}\!\Big(\frac{q k^\top}{\sqrt d}\Big) v, \qquad \mathrm{GEGLU}(x) = a \cdot \mathrm{GELU}(b), \quad
# [a, b] = W x$$

# %%
reading(
    ("SpatialTransformer.forward", "norm, 1×1 convolution, then [b c h w] → [b (h w) c]",
     "attention.SpatialTransformer.forward", "b c h w -> b (h w) c"),
    ("SpatialTransformer.forward", "back, 1×1 convolution that starts at zero, plus the input",
     "attention.SpatialTransformer.forward", "return x + self.proj_out("),
    ("Normalize", "GroupNorm with eps 1e-6, other than in the ResBlocks",
     "attention.SpatialTransformer.__init__", "eps=1e-6"),
    ("BasicTransformerBlock._forward", "attn1(norm1(x)) + x: pixels look at pixels",
     "attention.BasicTransformerBlock.forward", "self.attn1(self.norm1(x))"),
    ("BasicTransformerBlock._forward", "attn2(norm2(x), context) + x: pixels look at words",
     "attention.BasicTransformerBlock.forward", "self.attn2(self.norm2(x), context)"),
    ("BasicTransformerBlock._forward", "ff(norm3(x)) + x",
     "attention.BasicTransformerBlock.forward", "self.ff(self.norm3(x))"),
    ("CrossAttention.__init__", "to_q, to_k, to_v without bias",
     "attention.CrossAttention.__init__", "self.to_k = "),
    ("CrossAttention.forward", "context = default(context, x): self-attention if there is none",
     "attention.CrossAttention.forward", "context = x if context is None"),
    ("CrossAttention.forward", "'b n (h d) -> (b h) n d': heads into the batch",
     "attention.CrossAttention.forward", '"b n (h d) -> b h n d"'),
    ("CrossAttention.forward: sim", "q kᵀ · d^-½, then softmax",
     "attention.attention", "q.shape[-1] ** -0.5"),
    ("GEGLU.forward", "first the value, then the gate",
     "attention.GEGLU.forward", "x, gate = self.proj(x).chunk(2"),
    ("FeedForward", "widen by four, gate, come back",
     "attention.FeedForward.__init__", "GEGLU(dim, mult * dim)"),
    ("zero_module", "all parameters set to zero",
     "attention.zero_module", "nn.init.zeros_"),
)  # fmt: skip

# %% [markdown]
# **Oddities, and what is dead.**
#
# - `BasicTransformerBlock` has `checkpoint=True` by default, and `SpatialTransformer` does not hand anything on. So
#   transformers use gradient checkpointing *always*, whatever the YAML's `use_checkpoint` says.
# - `mask` of `CrossAttention.forward` is never given: padding is looked at like words (notebook 05).
# - The names `attn1` and `attn2` tell nothing; the comments do. `attn2` would be self-attention too without a context.
# - `LinearAttention`, `SpatialSelfAttention`, `uniq`, `max_neg_value` and `init_` are left over from other models.
# - `sim` is a full table of pixels × pixels: 16.8 million numbers for each head at 64×64. It is this line
#   that all the "optimised" forks replaced.
#
# ### Station 6: `ldm/models/autoencoder.py` and `ldm/modules/diffusionmodules/model.py`
#
# $$q(z \mid x) = \mathcal N\big(\mu(x), \sigma^2(x)\big), \qquad z = \mu + \sigma\,\epsilon, \qquad
# \mathrm{KL} = \tfrac12 \sum \big(\mu^2 + \sigma^2 - 1 - \log \sigma^2\big)$$

# %%
reading(
    ("AutoencoderKL.encode", "encoder, quant_conv, → DiagonalGaussianDistribution",
     "vae.FirstStage._encode", "self.quant_conv(self.encoder("),
    ("AutoencoderKL.decode", "post_quant_conv, decoder",
     "vae.FirstStage._decode", "self.decoder(self.post_quant_conv("),
    ("DiagonalGaussianDistribution.__init__",
     "mean and log variance are two halves of the channels; clamp to [-30, 20]",
     "vae.DiagonalGaussianDistribution.__init__", "clamp(-30.0, 20.0)"),
    ("DiagonalGaussianDistribution.sample", "mean + std · ε, ε drawn on the CPU",
     "vae.DiagonalGaussianDistribution.sample", "return self.mean + self.std"),
    ("DiagonalGaussianDistribution.kl", "½ Σ (mean² + var - 1 - log var)",
     "vae.DiagonalGaussianDistribution.kl", "return 0.5 *"),
    ("model.py: ResnetBlock.forward", "norm, swish, conv, norm, swish, conv, plus the input",
     "vae.ResnetBlock.forward", "self.nin_shortcut(x)"),
    ("model.py: AttnBlock.forward", "one head, over all pixels",
     "vae.AttnBlock.forward", "attention(q, k, v)"),
    ("model.py: Downsample.forward", "pad (0, 1, 0, 1): right and below only",
     "vae.Downsample.forward", "F.pad(x, (0, 1, 0, 1))"),
    ("model.py: Encoder.__init__: mid", "block, attention, block: always, whatever attn_resolutions says",
     "vae.Middle.forward", "self.attn_1(self.block_1(x))"),
    ("model.py: Encoder.__init__: conv_out", "2 · z_channels, if double_z",
     "vae.Encoder.__init__", "2 if config.double_z"),
    ("model.py: Decoder.__init__: up.insert(0, …)", "built from the bottom, numbered from the top",
     "vae.Decoder.__init__", "reversed(levels)"),
    ("VQModelInterface.decode", "quantise only on the way back",
     "vq.VQModelInterface.decode", "self.quantize(h)"),
    ("taming: VectorQuantizer2.forward", "legacy=True: β on the wrong term, as its own note admits",
     "vq.VectorQuantizer.loss", "if self.legacy"),
)  # fmt: skip

# %% [markdown]
# **Oddities, and what is dead.**
#
# - `model.py` holds a second UNet, `Model`, that of the original DDPM. `ResnetBlock` could take a time (`temb`); the
#   autoencoder gives none (`temb_ch = 0`), so there is no `temb_proj` in the checkpoint.
# - `get_timestep_embedding` in `model.py` has the sines first and divides by half - 1; `timestep_embedding` in
#   `util.py` has the cosines first and divides by half. Only the latter is used by Stable Diffusion.
# - `Encoder.forward` keeps all maps in a list `hs`, as a UNet would, and reads only the last.
# - `resolution` of the `ddconfig` serves to find where attention goes (and to print a size), and `attn_resolutions` is
#   empty. The autoencoder takes any size that is divisible by 8.
# - The VAE's eps is 1e-6. Its `lossconfig` is `torch.nn.Identity` in the YAML for drawing, so that the discriminator
#   need not be built.
#
# ### Station 7: `ldm/modules/encoders/modules.py`
#
# $$c = \mathrm{LayerNorm}\big(\mathrm{layers}_{1 \dots 12}(\mathrm{token} + \mathrm{place})\big), \quad 77 \times 768$$
#
# Only `FrozenCLIPEmbedder` is Stable Diffusion v1. It is a thin wrapper: the text tower is transformers'.

# %%
reading(
    ("FrozenCLIPEmbedder.__init__", "CLIPTokenizer and CLIPTextModel of transformers, openai/clip-vit-large-patch14",
     "clip.FrozenCLIPEmbedder.from_transformers", "transformers.CLIPTextModel"),
    ("FrozenCLIPEmbedder.freeze", "eval, no gradients",
     "clip.FrozenCLIPEmbedder.freeze", "self.eval()"),
    ("FrozenCLIPEmbedder.forward", "cut or fill up to 77 tokens",
     "clip.FrozenCLIPEmbedder.tokenize", "self.max_length"),
    ("FrozenCLIPEmbedder.forward", "the last hidden state [b 77 768]: all tokens, padding too",
     "clip.FrozenCLIPEmbedder.forward", "return self.transformer("),
    ("transformers: CLIPTextTransformer", "token plus place",
     "clip.CLIPTextEmbeddings.forward", "self.token_embedding(input_ids) +"),
    ("transformers: CLIPTextTransformer", "the mask of a language model: no token sees those after it",
     "clip.CLIPTextTransformer.__init__", "causal=True"),
    ("transformers: CLIPMLP", "quick-GELU, x σ(1.702 x)",
     "clip.CLIPMLP.forward", "1.702"),
    ("transformers: CLIPTextTransformer", "final_layer_norm comes after the last layer, and is part of the context",
     "clip.CLIPTextTransformer.forward", "self.final_layer_norm("),
    ("FrozenCLIPEmbedder.encode", "another name of forward, which LatentDiffusion asks for", "clip.FrozenCLIPEmbedder",
     "encode = forward"),
    ("ClassEmbedder", "a table: class → one vector; for the ImageNet models",
     "conditions.ClassEmbedder.encode", "self.embedding(ids)"),
)  # fmt: skip

# %% [markdown]
# **Oddities.** The text tower's weights are downloaded twice: from the hub in `__init__`, and again as part of the
# checkpoint, which then overwrites them. A prompt that is too long is cut without a word; minisd warns. Of the others
# in this file, `BERTEmbedder` is the text encoder of the earlier model, `FrozenCLIPTextEmbedder` (the pooled vector)
# and `FrozenClipImageEmbedder` serve retrieval, and `SpatialRescaler` serves models that are shown a map.
#
# ### Station 8: `ldm/models/diffusion/ddim.py` and `plms.py`
#
# $$\epsilon = \epsilon(\varnothing) + s\,\big(\epsilon(c) - \epsilon(\varnothing)\big), \qquad
# x_\text{prev} = \sqrt{\bar\alpha_\text{prev}}\,\hat x_0 + \sqrt{1 - \bar\alpha_\text{prev} - \sigma^2}\;\epsilon
# + \sigma z \qquad \text{(DDIM, eq. 12)}$$

# %%
reading(
    ("make_ddim_timesteps (util.py)", "every (1000 // steps)-th, plus 1: 1, 21, … 981",
     "sampling.make_timesteps", "1 if steps < T else 0"),
    ("make_ddim_sampling_parameters (util.py)", "ᾱ_prev: the chosen ᾱ one place further, with ᾱ_0 (not 1) at the end",
     "sampling._walk", "schedule.alpha_bar(0)"),
    ("make_ddim_sampling_parameters (util.py)", "σ = η √((1-ᾱ_prev)/(1-ᾱ)) √(1-ᾱ/ᾱ_prev)",
     "sampling.ddim", "sigma_t = eta *"),
    ("DDIMSampler.p_sample_ddim", "both contexts in one batch, the empty one first, then chunk(2)",
     "sampling.classifier_free_guidance", "torch.cat"),
    ("DDIMSampler.p_sample_ddim", "ε(∅) + s (ε(c) - ε(∅))",
     "sampling.classifier_free_guidance", "eps_uncond + scale * (eps_cond - eps_uncond)"),
    ("DDIMSampler.p_sample_ddim: pred_x0", "x̂_0 = (x - √(1-ᾱ) ε) / √ᾱ",
     "sampling.predict_x0", "return (x_t - sqrt(1 - a_t) * eps)"),
    ("DDIMSampler.p_sample_ddim: dir_xt, x_prev", "√ᾱ_prev x̂_0 + √(1-ᾱ_prev-σ²) ε + σ z",
     "sampling.ddim", "x_prev = sqrt(a_prev) * x0"),
    ("DDIMSampler.ddim_sampling: mask", "1 is what is KEPT; put back before each step, with fresh noise",
     "latent_diffusion.LatentDiffusion._put_back", "mask * x_t + (1 - mask)"),
    ("PLMSSampler.p_sample_plms: no past", "improved Euler: look ahead, take the mean of both ε",
     "sampling.plms", "ask(x_next)"),
    ("PLMSSampler.p_sample_plms: 2, 3, 4", "Adams-Bashforth: (55 ε - 59 ε' + 37 ε'' - 9 ε''') / 24",
     "sampling.plms_combine", "ADAMS_BASHFORTH[len(old_eps)]"),
    ("PLMSSampler.make_schedule", "eta must be 0",
     "sampling._check_eta", "draws no noise, so eta must be 0"),
)  # fmt: skip

# %%
visited = {
    "leading (CompVis)": (minisd.sampling.make_timesteps(10, 1000, "leading"), "→ ᾱ_0"),
    "trailing": (minisd.sampling.make_timesteps(10, 1000, "trailing"), "→ 1"),
}
for steps in (50, 30):
    theirs_count = len(range(0, 1000, 1000 // steps))
    print(f"asked for {steps} steps: every {1000 // steps}-th of 1000, makes {theirs_count}; minisd makes {steps}")
viz.ruler(visited)

# %% [markdown]
# **Oddities, and what is dead.**
#
# - t = 999 is never visited, though $x_T$ is what one would find there. And the last step leads to ᾱ_0, 0.99915, and
#   not to 1: a trace of noise stays.
# - `ddim_use_original_steps` looks for `ddim_sigmas_for_original_num_steps` in the *model*, but `make_schedule` puts it
#   into the *sampler*: whoever sets it gets an AttributeError.
# - `timesteps` of `ddim_sampling` drops one step too many (`subset_end … - 1`).
# - `schedule="linear"` of the constructor and `normals_sequence` of `sample` are not read. `temperature`,
#   `noise_dropout`, `score_corrector`, `quantize_x0` have defaults that do nothing.
# - `register_buffer` of the sampler is no buffer: it sets an attribute, and moves it to the GPU if there is one.
# - PLMS keeps the last *three* ε, and with the new one has four. Its first step asks the model twice.
#
# ### Station 9: training: `main.py` and `ldm/modules/losses/`
#
# `main.py` is a long way of saying: read the YAMLs, build model, data and callbacks by `instantiate_from_config`, and
# give them to Lightning's `Trainer`. What it adds is the learning rate, and what to do on a signal.
#
# $$L_\text{VAE} = \frac{|x - \hat x| + \mathrm{LPIPS}(x, \hat x)}{e^{s}} + s + 10^{-6}\,\mathrm{KL}
# + \lambda\,L_\text{GAN}, \qquad
# \lambda = \frac{\lVert\nabla_w L_\text{rec}\rVert}{\lVert\nabla_w L_\text{GAN}\rVert + 10^{-4}} \cdot 0.5$$
#
# $s$ is `logvar`, $w$ the last layer of the decoder.

# %%
reading(
    ("main.py: scale_lr", "learning rate · processes · batch · accumulated batches",
     "training/trainer.Recipe.lr_at", "self.lr * warm"),
    ("lr_scheduler.py: LambdaLinearScheduler", "the factor rises from 1e-6 to 1 in 10,000 steps, then stays",
     "training/trainer.Recipe.lr_at", "warm = min(1.0"),
    ("DDPM.training_step, shared_step", "get_input, then forward: a loss",
     "training/unet.train_unet", "losses = sd.p_losses("),
    ("main.py: data (DataModuleFromConfig)", "shuffled, another order in each epoch",
     "training/trainer._order", "permutation(n)"),
    ("main.py: accumulate_grad_batches", "several batches make one step", "training/trainer.Trainer.backward",
     "loss / self.recipe.accumulate"),
    ("main.py: ImageLogger → log_images", "draw samples now and then, with the means (ema_scope)",
     "training/trainer.Trainer.sheet", "self.ema.applied_to"),
    ("main.py: --resume", "go on from the newest checkpoint", "training/trainer.Trainer._resume", "self.folder.load"),
    ("main.py: melk, on SIGUSR1 or an error", "save a checkpoint before it ends",
     "training/trainer.Trainer.__iter__", "self.save()"),
    ("AutoencoderKL.training_step", "optimizer_idx 0: autoencoder, 1: discriminator",
     "training/vae.train_vae", "trainer.backward("),
    ("LPIPSWithDiscriminator.forward", "|x - x̂|",
     "training/vae.AutoencoderLoss.__call__", "nll_loss = (x - x_hat).abs()"),
    ("LPIPSWithDiscriminator.forward", "the perceptual loss, by LPIPS",
     "training/vae.AutoencoderLoss.__call__", "self.perceptual(x, x_hat)"),
    ("LPIPSWithDiscriminator.calculate_adaptive_weight", "‖∇ reconstruction‖ / ‖∇ generator‖, at the last layer",
     "training/discriminator.adaptive_weight", "return"),
    ("LPIPSWithDiscriminator.forward", "KL, summed over the latent, times 1e-6",
     "training/vae.train_vae", "posterior.kl()"),
)  # fmt: skip

# %% [markdown]
# **Oddities.**
#
# - The repository has no YAML for training v1, and no class for its data. What is known stands in the model card.
# - `logvar` of the autoencoder's loss is a parameter, and the comment in `training_step` says that it is trained. But
#   `configure_optimizers` hands the optimiser encoder, decoder and the two convolutions, and not the loss. So $s$ stays
#   0.
# - The reconstruction is a *sum* over all numbers of a picture, divided by the batch alone, and so is the KL. Here,
#   both are divided by how many numbers a picture has, which leaves their balance as it is.
# - The discriminator starts at step 50,001. Until then its weight is multiplied by 0, but it is computed.
# - With `scale_lr`, the learning rate of the YAML is not the one of the training: it grows with the number of GPUs.
#
# ## Find the counterpart
#
# Ten lines, or nearly: names and operations as they stand in the CompVis source. Where does each stand there, and where
# is it here? Look first at the source, then at the answers in the next cell.
#
# 1. `x_in = torch.cat([x] * 2)`
# 2. `hs.pop()`
# 3. `1. / self.scale_factor * z`
# 4. `name.replace('.', '')`
# 5. `steps_out = ddim_timesteps + 1`
# 6. `.chunk(2, dim=-1)`
# 7. `pad = (0,1,0,1)`
# 8. `z = outputs.last_hidden_state`
# 9. `torch.randint(0, self.num_timesteps, (x.shape[0],), …)`
# 10. `e_t_prime = (e_t + e_t_next) / 2`

# %%
reading(
    ("1. p_sample_ddim (ddim.py)", "two questions in one batch",
     "sampling.classifier_free_guidance", "torch.cat"),
    ("2. UNetModel.forward (openaimodel.py)", "the skip connection",
     "unet.UNetModel.forward", "skips.pop()"),
    ("3. decode_first_stage (ddpm.py)", "undo the scaling",
     "latent_diffusion.LatentDiffusion.decode_first_stage", "z / self.scale_factor"),
    ("4. LitEma.__init__ (ema.py)", "dots deleted",
     "checkpoint/compvis.ema_names", 'replace(".", "")'),
    ("5. make_ddim_timesteps (util.py)", "1, 21, …",
     "sampling.make_timesteps", "1 if steps < T else 0"),
    ("6. GEGLU.forward (attention.py)", "value and gate",
     "attention.GEGLU.forward", ".chunk(2, dim=-1)"),
    ("7. Downsample.forward (model.py)", "the VAE's, not the UNet's",
     "vae.Downsample.forward", "F.pad(x, (0, 1, 0, 1))"),
    ("8. FrozenCLIPEmbedder.forward (modules.py)", "the context",
     "clip.CLIPTextTransformer.forward", "self.final_layer_norm("),
    ("9. DDPM.forward, LatentDiffusion.forward (ddpm.py)", "a time for each picture",
     "loss._loss", "torch.randint("),
    ("10. p_sample_plms (plms.py)", "the first step",
     "sampling.plms", "eps = (eps + ask("),
)  # fmt: skip

# %%
work.cleanup()
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - A `.ckpt` is a zip of bare numbers and a pickle that names them. A pickle is a program: read it with
#   `weights_only=True`, or take `.safetensors`.
# - Its names are paths through the modules. Beside 859.5 + 83.7 + 123.1 million weights are the schedule,
#   `position_ids`, and perhaps the running means, under names without dots.
# - A model with the same names loads strictly and needs no converter. `strict=False` and converters fail silently:
#   where shapes agree, nothing protests, and a picture may look right.
# - Two networks are compared layer by layer. The first that differs is the place to look: if its input agrees, in it;
#   if not, just before it, between the modules.
# - The source is best read from `scripts/txt2img.py` inwards. Much of it is dead for v1: `split_input_params`,
#   `num_timesteps_cond`, `lvlb_weights`, `logvar`, `Model`. And what made v1, its data, YAML and text dropout, is not
#   in it.
#
# ## In the CompVis source
#
# | here | there | file |
# |---|---|---|
# | `minisd.load(path, config=…)` | `load_model_from_config` | `scripts/txt2img.py` |
# | `load_weights`, strictly | `DDPM.init_from_ckpt`, not strictly | `ldm/models/diffusion/ddpm.py` |
# | `ema_names` | `LitEma.copy_to`, `DDPM.ema_scope` | `ldm/modules/ema.py`, `ddpm.py` |
# | `schedule_buffers` | `DDPM.register_schedule` | `ddpm.py` |
# | `minisd.save(sd, "x.ckpt")` | Lightning's `ModelCheckpoint` | `main.py` |
# | `minisd.compare` | has no counterpart | |
#
# ## Try it
#
# - Set `CHECKPOINT` to a file of yours. Which names does it have beyond the three networks? Is it "EMA-only"?
# - Plant a fault of your own into a copy of the UNet (a SiLU left out, a skip connection joined in the other order, the
#   sines first), and let a friend find it with `minisd.compare`.
# - `minisd.save(sd, "mine.ckpt")`, then open `mine.yaml`. Which of its lines would CompVis's classes not need?
# - Take the `unet_forward` that you wrote in the exercises of stage 3, and compare it with `minisd.unet.UNetModel`.
#
# Before this: [notebook 08](08_training.ipynb). Next, in [notebook 10](10_evaluation.ipynb): does it draw what was
# asked? The map of it all is in [notebook 00](00_start_here.ipynb).
