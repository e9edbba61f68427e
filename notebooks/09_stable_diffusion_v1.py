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
# This notebook is about the real model: what is in `sd-v1-4.ckpt` or `v1-5-pruned.ckpt`, why it loads here without a
# converter, and how to read the source that it was trained with. At the end you can
#
# - say what a `.ckpt` consists of, and why loading one carelessly can run a program;
# - tell which of its tensors are weights, and what the others are for;
# - find the layer in which two networks begin to differ;
# - find any line of the CompVis source in minisd, and the other way round.
#
# About 35 minutes; it runs in about a minute on a laptop. The modules are
# [`minisd/checkpoint/`](../minisd/checkpoint/__init__.py) and
# [`minisd/instruments/comparison.py`](../minisd/instruments/comparison.py);
# [`docs/checkpoint.md`](../docs/checkpoint.md) has the commands. The [guided tour](../docs/play.md#tour=overview) names
# the class of CompVis at each stop.
#
# **You need no file of Stable Diffusion.** Without one, the notebook writes a small file in the same layout. If you
# have one, put its path below: a `.ckpt`, a `.safetensors`, or a folder in the layout of diffusers.

# %% [markdown] tags=["colab"]
# <details><summary>To run this notebook in Colab</summary>
#
# Upload the folder of minisd as `upload.zip`, and run this in a new cell above
# ([more about it](../docs/install.md#colab-and-other-notebooks-in-the-cloud)):
#
# ```text
# !unzip -q upload.zip && pip install -q "./minisd[data]"
# %cd minisd/notebooks
# ```
#
# </details>

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
# The official files were written by PyTorch Lightning, the library that CompVis trained with. The next cell writes one
# in the same way, from the model that comes with minisd. It holds a `state_dict` with the weights and more, and beside
# it what Lightning wants to remember: an epoch, a step, the state of its callbacks. (The weights that come with minisd
# are running means over training, see notebook 08. The weights before averaging were not kept, so the cell makes some
# up by adding a little noise.)

# %% tags=["hide-input"]
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
# ## It is a zip, and the zip contains a program
#
# Since PyTorch 1.6, `torch.save` writes an ordinary zip without compression.

# %% tags=["hide-input"]
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
# Nearly all of it is numbers, one entry for each tensor. `data.pkl` says what they are: names, shapes and types. It is
# a `pickle`, and a pickle does not describe objects, as JSON does. It is a **program** for a small machine, and the
# program builds the objects when it is run. Here are its first instructions, and what it fetches from Python modules:

# %% tags=["hide-input"]
if zipfile.is_zipfile(file):
    operations = list(pickletools.genops(program))
    print(f"{len(operations):,} instructions. The first:", " ".join(code.name for code, *_ in operations[:14]), "…")
    fetched = Counter(argument for code, argument, _ in operations if code.name == "GLOBAL")
    print("What it asks Python for:", *(name.replace(" ", ".") for name in fetched), sep="\n    ")

# %% [markdown]
# `_rebuild_tensor_v2` builds a tensor, and `OrderedDict` is harmless. But the machine has an instruction, REDUCE, that
# **calls** what was fetched, with any arguments, and nothing in the format restricts what a file may fetch.
#
# **Predict, then run.** Below is a pickle with a model of one number. What else happens on `pickle.loads`? Can you see
# it in the result?

# %% tags=["hide-output"]
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
# The program ran: it made a folder. It could as well have sent your files away, and the result shows nothing but a
# `None`. A file of weights from the web is a program from the web.
#
# `torch.load(…, weights_only=True)` runs the same machine with a short list of what may be fetched: tensors and plain
# containers. minisd always loads in this way. CompVis's scripts of 2022 did not. The official files name a class of
# Lightning that is not on the list:

# %%
try:
    torch.load(folder / "emoji.ckpt", map_location="cpu", weights_only=True)
except pickle.UnpicklingError as error:
    reason = next(line.strip() for line in str(error).splitlines() if "GLOBAL" in line)
    say("torch:  " + reason.partition(". Please use")[0])

state = read_weights(file)  # {name: tensor}
print(f"minisd:  {len(state)} tensors, the first is {next(iter(state))}")

# %% [markdown]
# Where a file asks for something of Lightning's, minisd provides a stand-in that makes an empty dictionary and can do
# nothing else (`Inert` in [`files.py`](../minisd/checkpoint/files.py)). Everything else is refused by name. A
# `.safetensors` file has none of this: it is a header in JSON, followed by the numbers. Use it where you can.
#
# ## The names
#
# A `state_dict` is flat. Each name is the path through the modules.

# %% tags=["hide-input"]
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
# The right half was counted on a model without memory. It has the well-known sizes: a UNet of **859.5 million**
# parameters, an autoencoder of **83.7 million** and a text encoder of **123.1 million**. In float32 that is 4.27 GB,
# the smaller download. The running means of the UNet add 3.44 GB, which makes 7.7 GB, the larger one. Some of the
# names, which are also the names of minisd's modules:

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
# **Predict.** From these shapes alone: how wide is the context? How many numbers does the encoder produce for each
# pixel of the latent? Why has `ff.net.0.proj` 10,240 outputs?
#
# <details><summary>Answer</summary>
#
# `attn2.to_k` has 768 inputs, the width of the context. `quant_conv` is [8, 8, 1, 1]: 8 numbers, the mean and log
# variance of 4 channels. 10,240 = 2 · 4 · 1,280: the feed-forward layer widens by four, and GEGLU needs a value and a
# gate.
#
# </details>
#
# ## What is not a weight
#
# **The schedule.** CompVis keeps $\beta$, $\bar\alpha$ and what follows from them as buffers, so they are saved. They
# follow from three numbers of the YAML file, so they add nothing. But they are a check, because weights that were
# trained with another schedule draw badly. At the end of this cell, one word of the YAML is changed, and minisd refuses
# to load.

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
# **`position_ids`** is 0, 1, …, 76. The text tower of transformers kept it as a buffer until 2023.
#
# **The running means** are called `model_ema.…`, and their names look odd:

# %%
ema = [name for name in state if name.startswith("model_ema.")]
for name in [name for name in ema if "transformer_blocks" in name][:4]:
    print("   ", name)
flat = [name.replace(".", "") for name in names_v1 if name.startswith("model.diffusion_model.")]
print(f"SD v1's {len(flat)} names of the UNet without their dots: {len(set(flat))} different ones")

# %% [markdown]
# PyTorch allows no dots in the name of a buffer, so CompVis's `LitEma` deletes them. The dots cannot be put back from
# the name alone: `input_blocks111…` could be `input_blocks.1.1.1…` or `input_blocks.11.1…`. But you need not. Delete
# the dots of the UNet's own names, and look up the result. No two of the 686 names become equal. (`ema_names` in
# [`compvis.py`](../minisd/checkpoint/compvis.py))
#
# Does it matter which of the two you use? Here are the same prompts and seed with each.

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
# The first two rows are the same model, once from a folder of minisd and once from the `.ckpt`. The third has the
# weights before averaging. (How rough they are was our choice.) Use the means for sampling; a file with both is meant
# for training on. The official "EMA-only" files hold the means *under the names of the UNet*. So `use_ema: False` in
# CompVis's YAML does not say that the weights are no means. It says that there is nothing to swap in.

# %%
if CHECKPOINT:
    drawn = sd.txt2img("a photograph of an astronaut riding a horse", steps=25 if full else 1, seed=42).pictures
    print(f"{CHECKPOINT}: {list(drawn.shape)}")
    viz.strip([drawn.cpu()], size=4)

# %% [markdown]
# ## The YAML beside it
#
# Weights do not say how many heads there are, which schedule was used, or what the scale factor is. CompVis keeps that
# in a YAML file. `target` is the path of a class, and `params` are the arguments of its constructor, which may be such
# pairs again. CompVis imports whatever class is named there and calls it (`instantiate_from_config`), so a YAML from
# the web is a program, too. minisd knows a list of targets and refuses others by name.

# %% tags=["hide-input"]
for line in (folder / "emoji.yaml").read_text().splitlines():
    depth = len(line) - len(line.lstrip())
    if depth <= 4 or (depth == 6 and "target" in line):
        print(line)

# %% [markdown]
# ## Strict loading, and what converters get wrong
#
# minisd's modules have the names of the file, so nothing is translated and loading can be *strict*: every name of the
# model is in the file with the right shape, and every name of the file is in the model or is one of those above. With
# `strict=False`, as in CompVis's scripts, what does not fit is skipped. Here is one typing error in one name:

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
# The alternative is a converter: a script that translates the names of one library into those of another. It has to
# know some 1,100 names, and where two tensors have the same shape, nothing tells it that it has swapped them. The next
# cell makes four such mistakes in the whole model, and adds the typing error.
#
# - `to_k` and `to_v` of the cross-attention, swapped;
# - the two halves of GEGLU, swapped (some libraries have the gate first);
# - `norm1` and `norm3` of each transformer block, swapped;
# - q and k of the autoencoder's attention, swapped.
#
# **Predict, then run.** Which mistakes do you see at once, and which not at all?

# %% tags=["hide-output"]
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
# You see the first two at once. With two norms swapped, the pictures still show what was asked for; without the first
# row you would think that the model is not well trained. The last two are practically invisible, although one layer of
# the UNet has random weights. So test a converter with numbers, and not with pictures.
#
# ## Equal, layer by layer
#
# diffusers is another implementation of the same networks, by other people. If both compute the same, both are probably
# right. `minisd.compare` runs both networks on the same input, pairs their layers, and compares the outputs. (If
# diffusers is not installed, these cells compare the network with a copy of itself.)

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
# Each row is a pair: our layer, which has CompVis's name, and theirs. In the UNet all names differ. Here is the same
# for all four networks:

# %%
print(f"{'':14}{'pairs':>6}{'agree':>7}{'largest difference':>20}{'of':>8}    in")
for name, comparison in comparisons.items():
    worst = max(comparison.rows, key=lambda row: row.difference)
    agree = sum(row.verdict == "agree" for row in comparison.rows)
    print(f"{name:14}{len(comparison.rows):6}{agree:7}{worst.difference:20.1e}{worst.size:8.2f}    {worst.ours}")
    assert comparison.equal

# %% [markdown]
# Zero means the same operations in the same order, to the last bit. Otherwise the sums were added in another order.
#
# ## Find the fault
#
# Now suppose that somebody wrote a UNet. It runs, the shapes are right, and the pictures are bad. Three faults that
# people really make:
#
# - **gate first** in GEGLU: `gate, x` instead of `x, gate`;
# - **eps** of GroupNorm, $(x - \mu) / \sqrt{\sigma^2 + \mathrm{eps}}$: 1e-5, PyTorch's default, where the transformers
#   have 1e-6;
# - **eps, larger**: 1e-3, TensorFlow's default.
#
# **Predict, then run.** In which layer does each show first? Which one would you never see in a picture?

# %% tags=["hide-output"]
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
# (Exact equality is drawn at 1e-9.) Up to the first transformer everything is equal. There the curves leave the floor,
# and what comes after differs *because of it*. So look at the first layer that differs.
#
# - **gate first**: the layer `ff.net.0.proj` agrees, and the *input* of the next one, `ff.net.2`, already differs. So
#   the fault is between them, in GEGLU's own line. `compare` tries a few such operations and names the one that fits.
# - **eps 1e-3**: the norm's input and weights agree and its output does not, so the fault is in its settings. No
#   picture would show it.
# - **eps 1e-5** changes the sixth digit, which is below any sensible tolerance. `compare` finds it because it compares
#   settings, too. It matters only where the variance of a group is small.
#
# The notches in the curves are layers that do not depend on the picture: `emb_layers` see only the time, and `to_k` and
# `to_v` of the cross-attention only the text.
#
# ## How to read the CompVis source
#
# The rest is a walk through [CompVis/stable-diffusion](https://github.com/CompVis/stable-diffusion). Read it with that
# source beside it. It grew out of OpenAI's improved- and guided-diffusion (the UNet, and much of the notation),
# lucidrains' denoising-diffusion-pytorch (`DDPM`) and CompVis's taming-transformers (the autoencoder), so one equation
# may occur three times in three styles. Start where the user starts, and go inwards:
#
#     scripts/txt2img.py ─► LatentDiffusion (ddpm.py) ─► DiffusionWrapper ─► UNetModel (openaimodel.py) ─► attention.py
#                        │            ├─► AutoencoderKL (autoencoder.py) ─► Encoder, Decoder (model.py)
#                        │            └─► FrozenCLIPEmbedder (encoders/modules.py)
#                        └─► DDIMSampler, PLMSSampler (ddim.py, plms.py)
#     main.py ─► Lightning's Trainer ─► LatentDiffusion.training_step; losses in ldm/modules/losses/

# %%
viz.class_diagram()

# %% [markdown]
# Each station below is a table: the place in CompVis's source, what stands there in our words, and the line of minisd
# that does the same. Our lines are looked up as the cell runs. Under each table is a folded list of oddities: what is
# dead code for Stable Diffusion v1, and what surprises a reader. (We read the versions that public archives keep. If
# yours differs, believe yours.) [`docs/compvis.md`](../docs/compvis.md) lists every class and method.

# %% tags=["hide-input"]
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
# Read `main` from its end. Without the options, the grid of pictures, the watermark and the safety checker, it is a
# dozen lines. `scripts/img2img.py` differs in the middle only.

# %% tags=["hide-input"]
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

# %% tags=["hide-input"]
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
# <details><summary>Oddities</summary>
#
# - Sampling runs under `autocast` in float16 by default, so the same seed gives other pictures than in float32.
# - `seed_everything` seeds the whole process once, so picture 5 depends on how many came before it. In minisd, picture
#   $k$ has seed + $k$.
#
# </details>
#
# ### Station 2: `ldm/models/diffusion/ddpm.py`, the class `DDPM`
#
# $$\bar\alpha_t = \prod_{s \le t} (1-\beta_s), \qquad
# x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$$
#
# `DDPM` is a diffusion model on pixels. `LatentDiffusion` inherits from it and overrides nearly everything that touches
# data. Begin with `register_schedule`.

# %% tags=["hide-input"]
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
# <details><summary>Oddities, and what is dead</summary>
#
# - The schedule called `"linear"` is linear in $\sqrt\beta$. The one that is linear in $\beta$ is called
#   `"sqrt_linear"`.
# - `log_one_minus_alphas_cumprod` serves `q_mean_variance`, which serves `_prior_bpd`, which nothing in the file calls.
# - `v_posterior` mixes the two variances that the DDPM paper proposes. Its default, 0, is the smaller one.
# - `lvlb_weights` are the weights of the variational bound. They are computed and logged in each step, and then
#   multiplied by `original_elbo_weight`, which is 0. The figure below shows what they would do.
# - In the branch for `x0`, `2. * 1 - torch.Tensor(alphas_cumprod)` is $2 - \bar\alpha$, where $2(1 - \bar\alpha)$ was
#   probably meant. Stable Diffusion does not use `x0`.
# - `logvar`, 1,000 zeros, would weight the timesteps with `learn_logvar`. It is a plain tensor and has to be moved to
#   the device by hand.
#
# </details>

# %% tags=["hide-input"]
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
# On the right: the bound would put most weight on the first few timesteps, where there is next to no noise. Without
# these weights all timesteps count alike, and DDPM found that this draws better pictures (notebook 02).
#
# ### Station 3: `LatentDiffusion`, in the same file
#
# $$z = 0.18215 \cdot \mathcal E(x), \qquad
# L = \mathbb E_{z, c, \epsilon, t}\,\big\lVert \epsilon - \epsilon_\theta(z_t, t, \tau(c)) \big\rVert^2, \qquad
# \hat x = \mathcal D(z / 0.18215)$$
#
# $\mathcal E$ and $\mathcal D$ are encoder and decoder, and $\tau$ is the text encoder. The class consists of these
# three formulas, and of what keeps $\mathcal E$, $\mathcal D$ and $\tau$ from being trained.

# %% tags=["hide-input"]
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
# There is **no text dropout** in this code, although the model card says that 10% of the captions were dropped. In
# minisd it is in `training/unet.py`:

# %% tags=["hide-input"]
reading(
    ("(nothing)", "10% of the captions are replaced by the empty one",
     "loss.text_dropout", "torch.where(drop"),
    ("(nothing)", "where it is called",
     "training/unet.train_unet", "context = text_dropout("),
)  # fmt: skip

# %% [markdown]
# <details><summary>Oddities, and what is dead</summary>
#
# - `first_stage_key: "jpg"` and `cond_stage_key: "txt"` are the names in a batch of a web data set, but `get_input`
#   recognises texts by the keys `caption` and `coordinates_bbox`. The data set and the training YAML are missing, too.
#   v1 was probably trained with more code than what is public.
# - With `scale_by_std`, `scale_factor` is a buffer and comes with the checkpoint. Without it, it is a number of the
#   YAML. minisd reads both.
# - `num_timesteps_cond` would put noise on the context, too. It is 1, which means off.
# - `split_input_params`, more than two hundred lines, draws large pictures in overlapping patches. Nothing sets it for
#   v1.
# - In `p_sample`, two lines stand behind a `raise DeprecationWarning` and are never reached.
#
# </details>
#
# ### Station 4: `ldm/modules/diffusionmodules/openaimodel.py`, the class `UNetModel`
#
# $$\mathrm{ResBlock}(x) = \mathrm{skip}(x) + \mathrm{conv}\big(\mathrm{SiLU}(\mathrm{norm}(
# \mathrm{conv}(\mathrm{SiLU}(\mathrm{norm}(x))) + W\,\mathrm{SiLU}(\mathrm{emb}(t))))\big)$$
#
# Read `forward` first. It is a dozen lines, and it explains `__init__`.

# %% tags=["hide-input"]
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
# <details><summary>Oddities, and what is dead</summary>
#
# - `image_size: 32  # unused` is a required argument that is never read.
# - `attention_resolutions: [4, 2, 1]` are downsampling factors: attention on maps of 16, 32 and 64. The middle block
#   always has a transformer, so the maps of 8 have one, too.
# - `use_scale_shift_norm`, `resblock_updown`, `num_classes`, `n_embed` and `dims` 1 and 3 belong to other models.
#   minisd refuses a YAML that asks for them.
# - `convert_to_fp16` applies functions that are replaced by `pass` at the top of the file.
# - `num_heads` is overwritten inside the loop where `num_head_channels` is set. v1 does not set it: it has 8 heads
#   everywhere, of 40 channels on the first level and 160 at the bottom.
#
# </details>
#
# ### Station 5: `ldm/modules/attention.py`
#
# $$\mathrm{softmax}\!\Big(\frac{q k^\top}{\sqrt d}\Big) v, \qquad \mathrm{GEGLU}(x) = a \cdot \mathrm{GELU}(b), \quad
# [a, b] = W x$$

# %% tags=["hide-input"]
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
# <details><summary>Oddities, and what is dead</summary>
#
# - `BasicTransformerBlock` has `checkpoint=True` by default and `SpatialTransformer` passes nothing on, so the
#   transformers *always* use gradient checkpointing.
# - `mask` of `CrossAttention.forward` is never passed, so padding is attended to like words (notebook 05).
# - The names `attn1` and `attn2` explain nothing. `attn2` would be self-attention, too, without a context.
# - `LinearAttention`, `SpatialSelfAttention`, `uniq`, `max_neg_value` and `init_` are left over from other models.
# - `sim` is a full table of pixels × pixels, 16.8 million numbers for each head at 64×64. The "optimised" forks
#   replaced this line.
#
# </details>
#
# ### Station 6: `ldm/models/autoencoder.py` and `ldm/modules/diffusionmodules/model.py`
#
# $$q(z \mid x) = \mathcal N\big(\mu(x), \sigma^2(x)\big), \qquad z = \mu + \sigma\,\epsilon, \qquad
# \mathrm{KL} = \tfrac12 \sum \big(\mu^2 + \sigma^2 - 1 - \log \sigma^2\big)$$

# %% tags=["hide-input"]
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
# <details><summary>Oddities, and what is dead</summary>
#
# - `model.py` contains a second UNet, `Model`, that of the original DDPM. `ResnetBlock` could take a time (`temb`), but
#   the autoencoder passes none.
# - `get_timestep_embedding` in `model.py` has the sines first and divides by half - 1. `timestep_embedding` in
#   `util.py` has the cosines first and divides by half. Stable Diffusion uses only the latter.
# - `Encoder.forward` keeps all maps in a list, as a UNet would, and reads only the last.
# - `attn_resolutions` is empty, so `resolution` decides nothing. The autoencoder takes any size that is divisible by 8.
#
# </details>
#
# ### Station 7: `ldm/modules/encoders/modules.py`
#
# $$c = \mathrm{LayerNorm}\big(\mathrm{layers}_{1 \dots 12}(\mathrm{token} + \mathrm{position})\big),
# \quad 77 \times 768$$
#
# Stable Diffusion v1 uses only `FrozenCLIPEmbedder`, a thin wrapper around the text tower of transformers.

# %% tags=["hide-input"]
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
# <details><summary>Oddities</summary>
#
# - The text tower's weights are loaded twice: from the hub in `__init__`, and again from the checkpoint.
# - A prompt that is too long is cut without a warning.
# - `BERTEmbedder` is the text encoder of an earlier model, `FrozenCLIPTextEmbedder` and `FrozenClipImageEmbedder` serve
#   retrieval, and `SpatialRescaler` serves models that get a map.
#
# </details>
#
# ### Station 8: `ldm/models/diffusion/ddim.py` and `plms.py`
#
# $$\epsilon = \epsilon(\varnothing) + s\,\big(\epsilon(c) - \epsilon(\varnothing)\big), \qquad
# x_\text{prev} = \sqrt{\bar\alpha_\text{prev}}\,\hat x_0 + \sqrt{1 - \bar\alpha_\text{prev} - \sigma^2}\;\epsilon
# + \sigma z \qquad \text{(DDIM, eq. 12)}$$

# %% tags=["hide-input"]
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

# %% tags=["hide-input"]
visited = {
    "leading (CompVis)": (minisd.sampling.make_timesteps(10, 1000, "leading"), "→ ᾱ_0"),
    "trailing": (minisd.sampling.make_timesteps(10, 1000, "trailing"), "→ 1"),
}
for steps in (50, 30):
    theirs_count = len(range(0, 1000, 1000 // steps))
    print(f"asked for {steps} steps: every {1000 // steps}-th of 1000, makes {theirs_count}; minisd makes {steps}")
viz.ruler(visited)

# %% [markdown]
# <details><summary>Oddities, and what is dead</summary>
#
# - t = 999 is never visited, and the last step leads to $\bar\alpha_0 = 0.99915$ and not to 1, so a trace of noise
#   stays.
# - `ddim_use_original_steps` looks in the *model* for a buffer that `make_schedule` puts into the *sampler*, so it ends
#   in an AttributeError.
# - `timesteps` of `ddim_sampling` drops one step too many (`subset_end … - 1`).
# - `schedule="linear"` of the constructor and `normals_sequence` of `sample` are not read.
# - `register_buffer` of the sampler registers no buffer. It sets an attribute and moves it to the GPU if there is one.
#
# </details>
#
# ### Station 9: training, `main.py` and `ldm/modules/losses/`
#
# `main.py` reads the YAML files, builds model, data and callbacks, and gives them to Lightning's `Trainer`.
#
# $$L_\text{VAE} = \frac{|x - \hat x| + \mathrm{LPIPS}(x, \hat x)}{e^{s}} + s + 10^{-6}\,\mathrm{KL}
# + \lambda\,L_\text{GAN}, \qquad
# \lambda = \frac{\lVert\nabla_w L_\text{rec}\rVert}{\lVert\nabla_w L_\text{GAN}\rVert + 10^{-4}} \cdot 0.5$$
#
# $s$ is `logvar`, and $w$ is the last layer of the decoder.

# %% tags=["hide-input"]
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
# <details><summary>Oddities</summary>
#
# - The repository has no YAML for training v1 and no class for its data. What is known is in the model card.
# - A comment says that `logvar` is trained, but `configure_optimizers` does not pass it on. So $s$ stays 0.
# - The reconstruction and the KL are *sums* over all numbers of a picture. minisd divides both by the number of
#   numbers, which leaves their balance as it is.
# - The discriminator starts at step 50,001. Until then it is computed and its weight is multiplied by 0.
# - With `scale_lr`, the learning rate grows with the number of GPUs.
#
# </details>
#
# ## Find the counterpart
#
# Ten pieces of the CompVis source:
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
#
# **Predict, then run.** Look at the source. Where is each of them there, and where here?

# %% tags=["hide-input", "hide-output"]
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

# %% [markdown]
# ## What you know now
#
# - A `.ckpt` is a zip of numbers and a pickle that names them. A pickle is a program, so load it with
#   `weights_only=True`, or use `.safetensors`.
# - Its names are paths through the modules. Beside 859.5 + 83.7 + 123.1 million weights it holds the schedule,
#   `position_ids`, and perhaps running means under names without dots.
# - A model with the same names loads strictly and needs no converter. `strict=False` and converters fail silently.
# - Compare two networks layer by layer. The first layer that differs is the place to look: inside it if its input
#   agrees, just before it if not.
# - Read the source from `scripts/txt2img.py` inwards. Much of it is dead for v1, and what made v1, its data, YAML and
#   text dropout, is not in it.
#
# **Try it.** Set `CHECKPOINT` to a file of yours: is it "EMA-only"? Plant a fault in a copy of the UNet (a skip
# connection joined in the other order, the sines first), and let a friend find it with `minisd.compare`.
#
# **Next**: the model is right. [Notebook 10](10_evaluation.ipynb) measures whether it draws what was asked.

# %% [markdown]
# ## Optional: where in the file is what?

# %% tags=["hide-input"]
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
# Left: the UNet has the first 686 tensors and four fifths of the file. It rises in jumps because few tensors are large.
# Right: the blocks in the order in which they run. The largest is in the middle, where there are 1,280 channels, and on
# the way up those of the skip connections besides (notebook 03).
#
# ## Optional: when eps matters

# %%
def norm(x, eps):
    return F.group_norm(x, 32, eps=eps)


print("size of the input, and how much 1e-5 in place of 1e-6 changes the output (of size about 3):")
for size in (1, 0.1, 0.01, 0.001):
    h = size * torch.randn(1, 192, 4, 4, generator=g)
    print(f"{size:10}{(norm(h, 1e-5) - norm(h, 1e-6)).abs().max().item():12.1e}")

# %% [markdown]
# Where the variance of a group is small, eps is no longer small beside it.
#
# ## Optional: three layouts
#
# The same tensor, as each library calls it.

# %% tags=["hide-input"]
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
# Two traps for converters. The autoencoder's `decoder.up.0` is the *last* to run in CompVis, because it is numbered by
# resolution, and diffusers' `up_blocks.0` is the first. And CompVis's attention of the autoencoder projects by 1×1
# convolutions, [512, 512, 1, 1], where diffusers has Linear layers, [512, 512]. The round trip through all three:

# %%
reference = emoji.state_dict()
now = emoji
for layout, target in {"diffusers": "a", "compvis": "b.ckpt", "minisd": "c"}.items():
    minisd.save(now, folder / target, layout=layout)
    yaml = (folder / target).with_suffix(".yaml")
    now = minisd.load(folder / target, device="cpu", config=yaml if layout == "compvis" else None)
    changed = sum(not torch.equal(tensor, reference[name]) for name, tensor in now.state_dict().items())
    print(f"saved as {layout:10} and loaded again: {changed} of {len(reference)} tensors changed")

# %%
work.cleanup()
print(f"This notebook took {time.time() - start:.0f} s.")
