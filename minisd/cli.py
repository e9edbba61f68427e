"""The command line. Every command is a function: its arguments are the flags, and its docstring is the help.

minisd txt2img "a fox, noto style" --out fox.png
minisd data emoji | data scenes | data shapes | data hub OWNER/NAME --out FOLDER
minisd train clip | train vae | train unet
minisd train unet --init emoji --data FOLDER | train vae --init emoji --data FOLDER
minisd train lora --init emoji --data FOLDER | train token "<toy>" --like fox --init emoji --data FOLDER
minisd evaluate
minisd img2img "a fox, noto style" PICTURE | inpaint "a fox, noto style" PICTURE MASK
minisd page --model runs/emoji/unet/model --out FOLDER
minisd info FILE | verify FILE
minisd convert v1-5-pruned.ckpt FOLDER --layout diffusers
"""

import os
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import torch
import tyro
from tyro.conf import Positional

from . import PRESETS, BPETokenizer, CLIPModel, LatentDiffusion, evaluation, load, load_clip, save, training
from . import live as pages
from .checkpoint import SHIPPED, Layout, describe, files, has_clip
from .conditions import CONDITIONS
from .data import Corpus, build_emoji, build_scenes, draw_shapes, fetch_dataset, open_corpus
from .data.packages import DEFAULT_STYLES
from .data.text import printable
from .instruments.verify import verify as verify_file
from .latent_diffusion import enough_memory
from .lora import Adapter, LoRA, NewToken, load_lora, load_token
from .sampling import SAMPLERS
from .training import LPIPS, CLIPPerceptual, Engine, recipes
from .viz import sheet

Sampler = Literal[tuple(SAMPLERS)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Dtype = Literal[tuple(DTYPES)]
Preset = Literal[tuple(recipes.UNET)]  # those of PRESETS that have a recipe
Condition = Literal[tuple(CONDITIONS)]

# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """For all three ways of drawing."""

    # "emoji" or "tiny", which come with minisd; a folder in minisd's or in diffusers' layout; a CompVis .ckpt or
    # .safetensors; or owner/name on the Hugging Face hub
    model: str = "emoji"
    config: Path | None = None  # the YAML of a CompVis file; if left out, the one beside it, or that of SD v1
    ignore: tuple[str, ...] = ()  # names of superfluous tensors in a CompVis file, which are left out
    lora: tuple[str, ...] = ()  # files of `minisd train lora` and others, each with a strength if it is not 1: FILE:0.8
    token: tuple[str, ...] = ()  # files of `minisd train token` and others: new words, for the prompt
    steps: int = 25  # denoising steps: one call of the network in each, or two with heun
    guidance: float = 4.0  # 1: no guidance; larger: exaggerates what the prompt changes
    negative: str = ""  # what not to draw
    sampler: Sampler = "dpmpp_2m"
    seed: int = 0  # picture k is drawn from seed + k
    num_images: int = 4
    height: int | None = None  # pixels; if left out, the size that the model was trained at
    width: int | None = None
    out: Path = Path("out.png")  # all pictures side by side
    scale: int | None = None  # enlarges each pixel to a square; if left out, small pictures get up to 128 pixels
    trajectory: Path | None = None  # a film of the estimated final pictures, step by step (.webp or .gif)
    device: str | None = None  # "cuda", "mps" or "cpu"; the fastest if left out
    dtype: Dtype = "fp32"  # what the networks compute in

    def draw(self, method: Callable, *given, **more) -> None:
        """Draw with this method of the model, and write the pictures."""
        if self.scale is not None and not 1 <= self.scale <= 1000:
            raise ValueError(f"--scale enlarges each pixel to a square of 1 to 1,000 pixels a side, not {self.scale}")
        _check_writable(self.out, (".png", ".webp", ".jpg", ".jpeg"))  # now, because drawing takes time
        if self.trajectory:
            _check_writable(self.trajectory, (".webp", ".gif"))
        sd = load(self.model, self.device, DTYPES[self.dtype], config=self.config, ignore=self.ignore)
        for given_file in self.lora:
            load_lora(sd, *_file_and_strength(given_file))
        for given_file in self.token:
            load_token(sd, given_file)
        out = method(
            sd, *given, steps=self.steps, guidance_scale=self.guidance, sampler=self.sampler, seed=self.seed,
            negative_prompt=self.negative, num_images=self.num_images, progress=True,
            height=sd.config.image_size if self.height is None else self.height,
            width=sd.config.image_size if self.width is None else self.width, **more,
        )  # fmt: skip
        scale = self.scale or max(1, 128 // out.images[0].width)
        _write(self.out, sheet(out.images, scale=scale).save)
        if self.trajectory:
            _write(self.trajectory, lambda path: out.trajectory.save(path, scale=scale))


def txt2img(prompt: Positional[str], drawing: Options) -> None:
    """Draw pictures from a prompt.

    Args:
        prompt: what to draw; "" leaves it to the model
    """
    drawing.draw(LatentDiffusion.txt2img, prompt)


def img2img(prompt: Positional[str], image: Positional[Path], drawing: Options, strength: float = 0.75) -> None:
    """Draw over a picture, guided by a prompt.

    Args:
        prompt: what to draw; "" leaves it to the model
        image: the picture; it is resized to the size that is drawn
        strength: how far the drawing may depart from the picture: 0 not at all, 1 freely
    """
    drawing.draw(LatentDiffusion.img2img, prompt, image, strength=strength)


def inpaint(
    prompt: Positional[str], image: Positional[Path], mask: Positional[Path], drawing: Options, strength: float = 1.0
) -> None:
    """Redraw a part of a picture, guided by a prompt.

    Args:
        prompt: what to draw; "" leaves it to the model
        image: the picture; it is resized to the size that is drawn
        mask: white where the picture is redrawn, black where it is kept
        strength: how far the redrawn part may depart from what was there: 0 not at all, 1 freely
    """
    drawing.draw(LatentDiffusion.inpaint, prompt, image, mask, strength=strength)


def page(out: Path, model: str = "emoji", prompts: tuple[str, ...] = ("a fox, noto style",)) -> None:
    """Write a page in which a model draws, in a browser and without a server. It opens by a double click.

    Args:
        out: the folder to make
        model: "emoji", "tiny", or a folder that `minisd train unet` or `minisd convert` made
        prompts: drawn now, as recordings that the page shows at first
    """
    folder = SHIPPED / model if model in ("emoji", "tiny") else Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model in minisd's layout: `minisd convert MODEL FOLDER` makes one")
    if out.is_dir() and any(out.iterdir()) and not (out / "page.js").exists():
        raise FileExistsError(f"{out} holds something else than a page: give --out another folder")
    sd = load(folder, "cpu")
    pages.check(sd, folder)
    pages.write_page(folder, out, model, [pages.record(sd, prompt) for prompt in prompts])
    print(f"wrote {out}: open {out / 'index.html'} in a browser")


# --- data -------------------------------------------------------------------------------------------------------------


def data_emoji(out: Path = Path("data/emoji"), size: int = 64, styles: tuple[str, ...] = DEFAULT_STYLES) -> None:
    """Fetch and render the emoji corpus: about 11,700 captioned pictures of 1,641 concepts in nine styles.

    Args:
        size: pixels along each side
        styles: which styles, with - for spaces: noto fluent-3d
    """
    build_emoji(out, size, styles)


def data_scenes(out: Path = Path("data/scenes"), emoji: Path = Path("data/emoji"), size: int = 64) -> None:
    """Cut the emoji out, so that training composes scenes of them: "a blue fox to the left of a rocket".

    Args:
        emoji: the folder that `minisd data emoji` made
        size: pixels along each side of a scene
    """
    build_scenes(out, emoji, size)


def data_shapes(out: Path = Path("data/shapes"), count: int = 4000, size: int = 32, seed: int = 0) -> None:
    """Draw a corpus of coloured shapes with exact captions.

    Args:
        size: pixels along each side
    """
    draw_shapes(out, count, size, seed)


def data_hub(
    source: Positional[str],
    out: Path,
    split: str = "train",
    image: str = "image",
    text: str = "text",
    size: int = 64,
    count: int | None = None,
) -> None:
    """Fetch a data set from the Hugging Face hub, or from parquet files.

    Args:
        source: "owner/name" on the hub, or a folder of parquet files
        out: the folder to make, which --data then takes
        image: the column of pictures
        text: the column of captions
        size: pixels along each side
        count: how many rows to read; all if left out
    """
    fetch_dataset(source, out, split, image, text, size, count)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """For all three trainings."""

    # a folder of pictures with captions, or with what --condition needs instead; several are mixed in equal shares
    data: tuple[Path, ...]
    out: Path  # the run's folder, with clip/, vae/ and unet/; a run that is there is continued
    device: str | None = None  # "cuda", "mps" or "cpu"; the fastest if left out
    precision: Literal["bf16", "no"] = "bf16"  # "no": everything in float32

    def engine(self) -> Engine:
        return training.make_engine(self.device, self.precision)

    def pictures(self, size: int | None, captions: bool = True) -> Corpus:
        return open_corpus([_corpus(folder) for folder in self.data], size, "train", captions)


def train_clip(preset: Preset, run: Run, recipe: training.CLIPRecipe) -> None:
    """Train the tokenizer, the text tower and the image tower.

    Args:
        preset: the sizes of the networks, and the recipe that the other flags change
    """
    engine, folder, vision = run.engine(), run.out / "clip", recipes.VISION[preset]
    pictures = run.pictures(vision.image_size)
    training.train_clip(PRESETS[preset].cond_stage, vision, recipe, pictures, folder, engine)
    _wrote(folder, engine)


def train_vae(
    preset: Preset | None,
    run: Run,
    recipe: training.VAERecipe,
    first_stage: Literal["kl", "vq"] | None = None,
    init: str | None = None,
    clip: Path | None = None,
    lpips: tuple[Path, Path] | None = None,
) -> None:
    """Train the autoencoder, and measure the scale factor of its latents.

    Args:
        preset: the size of the pictures and of the networks, and the recipe that the other flags change; if left out
            with `--init X --no-decoder-only`, the pictures keep the size that they have
        first_stage: kl (if left out): latents near N(0, I), as in Stable Diffusion; vq: from a codebook
        init: a finished model whose decoder is trained further: "emoji", or anything else that --model of txt2img
            takes; the rest of the model does not change. With --no-decoder-only, the whole autoencoder of a model, or
            of a finished run of `minisd train vae`, is trained further. It gets new latents, which a UNet trained on
            the old ones does not fit, so OUT/vae gets vae.json and vae.safetensors, as from scratch, and no model
        clip: a finished run of CLIP, whose image tower measures for perceptual_weight how alike pictures look; if left
            out, OUT/clip, or the CLIP of the model that --init names
        lpips: LPIPS instead of CLIP: the files of torchvision's VGG16 and of LPIPS' own weights
    """
    engine, folder, clip_beside = run.engine(), run.out / "vae", None
    if init and first_stage:
        raise ValueError(f"the autoencoder of {init} stays of its kind: leave --first-stage out")
    perceptual = None
    if recipe.perceptual_weight:
        perceptual = _perceptual(lpips, clip or init or run.out / "clip").to(engine.device)
    size = PRESETS[preset].image_size if preset else None  # None: that of the data
    if init and recipe.decoder_only:
        model, clip_beside = load(init, engine.device), init if has_clip(init) else None
        size = model.config.image_size
    elif init:
        model, _ = training.finished_vae(init)
    else:
        preset = preset or "emoji"
        model = recipes.VQ[preset] if first_stage == "vq" else PRESETS[preset].first_stage
    training.train_vae(model, recipe, run.pictures(size, False), folder, engine, perceptual, clip_beside)
    _wrote(folder / "model" if isinstance(model, LatentDiffusion) else folder, engine)


def _perceptual(lpips: tuple[Path, Path] | None, clip: str | Path) -> CLIPPerceptual | LPIPS:
    if lpips:
        return LPIPS.from_files(*lpips)
    instead = ", or give LPIPS by --lpips VGG16.pth VGG.pth, or leave this term out by --perceptual-weight 0"
    return CLIPPerceptual(_towers(clip, "perceptual_weight needs", instead)[0])


def train_unet(
    preset: Preset,
    run: Run,
    recipe: training.UNetRecipe,
    init: str | None = None,
    condition: Condition | None = None,
    class_column: str | None = None,
    parameterization: Literal["eps", "v", "x0"] | None = None,
    keep_at: tuple[int, ...] = (),
) -> None:
    """Train the UNet on top of a finished autoencoder and, for captions, a finished CLIP.

    Args:
        preset: the sizes of the networks, and the recipe that the other flags change
        init: a finished model to fine-tune on your own pictures: "emoji", or anything else that --model of txt2img
            takes; its text tower and autoencoder do not change, so that neither `train clip` nor `train vae` is needed
        condition: what the model is conditioned on, if it is trained from scratch
        class_column: the column of metadata.jsonl with the class; if left out, the folders' names
        parameterization: what the UNet predicts, if it is trained from scratch; if left out, eps
        keep_at: steps after which a copy of the UNet is kept, beside the finished model
    """
    engine, folder = run.engine(), run.out / "unet"
    if init:
        if condition or class_column or parameterization:
            raise ValueError(
                f"--init {init} keeps the condition of that model and what it predicts: leave --condition, "
                "--class-column and --parameterization out"
            )
        model, given = load(init, engine.device), {"clip": init if has_clip(init) else None}
        config, captions = model.config, model.cond_stage_model.needs_captions
    else:
        condition = condition or "captions"
        captions = CONDITIONS[condition].needs_captions
        parts = {part: run.out / part for part in (["clip", "vae"] if captions else ["vae"])}
        for part, path in parts.items():
            if not files.as_written(path / f"{part}.json").exists():
                raise FileNotFoundError(f"the UNet needs a finished {part}: run `minisd train {part} --out {run.out}`")
        model = config = replace(PRESETS[preset], parameterization=parameterization or "eps")
        given = parts | {"condition": condition, "column": class_column}
    data = run.pictures(config.image_size, captions)
    sd = training.train_unet(model, recipe, data, folder, engine, keep_at=keep_at, **given)
    prompt = shlex.quote(str(sd.cond_stage_model.prompts(data)[0][0]))
    inpaints = isinstance(sd.cond_stage_model, CONDITIONS["inpainting"])
    what = f"inpaint {prompt} PICTURE MASK" if inpaints else f"txt2img {prompt}"
    _wrote(f"{folder / 'model'}: try `minisd {what} --model {folder / 'model'}`", engine)


def train_lora(
    run: Run, recipe: training.UNetRecipe, init: str = "emoji", rank: int = 4, alpha: float | None = None
) -> None:
    """Train a LoRA, a small change of a finished model's attention: for a new style or thing, in a small file.

    Args:
        init: the finished model, which is not changed: "emoji", or anything else that --model of txt2img takes
        rank: how many dimensions each change has; the file grows with it
        alpha: the changes are multiplied by alpha / rank; if left out, that is 1
    """
    _train_adapter("lora", lambda sd: LoRA.new(sd, rank, alpha, seed=recipe.seed), init, run, recipe)


def train_token(
    run: Run, recipe: training.UNetRecipe, word: Positional[str] = "<new>", init: str = "emoji", like: str = ""
) -> None:
    """Teach a finished model a new word by textual inversion. The word stands in the captions of the pictures.

    Args:
        word: in small letters, and new to the model
        init: the finished model, which is not changed: "emoji", or anything else that --model of txt2img takes
        like: words that the model knows, from whose meaning the training starts
    """
    _train_adapter("token", lambda sd: NewToken(sd, word, like), init, run, recipe)


def _train_adapter(
    name: str, new: Callable[[LatentDiffusion], Adapter], init: str, run: Run, recipe: training.UNetRecipe
) -> None:
    engine = run.engine()
    sd = load(init, engine.device)
    adapter = new(sd)
    data, file = run.pictures(sd.config.image_size), run.out / name / adapter.file_name
    prompt = next((words[0] for words in sd.cond_stage_model.prompts(data) if adapter.reads(words[0])), None)
    if prompt is None:
        raise ValueError(f"no caption in {run.data[0]} has the word {adapter.word}: write it where the new thing is")
    training.train_unet(sd, recipe, data, file.parent, engine, adapter=adapter)
    _wrote(f"{file}: try `minisd txt2img {shlex.quote(prompt)} --model {init} --{name} {file}`", engine)


def _wrote(what: str | Path, engine: Engine) -> None:
    if engine.is_main_process:  # only one of several processes prints
        print(f"wrote {printable(what)}")


# --- models and files -------------------------------------------------------------------------------------------------


def evaluate(
    model: str = "emoji",
    clip: str | None = None,
    data: Path = Path("data/emoji"),
    count: int = 1000,
    steps: int = 25,
    guidance: float = 4.0,
    sampler: Sampler = "dpmpp_2m",
    seed: int = 0,
    composition: bool = False,
    scenes: Path = Path("data/scenes"),
    out: Path | None = None,
    device: str | None = None,
) -> None:
    """Measure how well a model draws what prompts say: scores, distances, copies of its data.

    Args:
        model: "emoji", or a folder
        clip: a model's folder, or a run of `minisd train clip`, whose image tower gives the scores; if left out, the
            model's
        data: the corpus that it was trained on
        count: how many captions of each kind, at most
        composition: instead: does it draw scenes, with the right things, positions and colours?
        scenes: the things of these scenes
        out: a folder for scores.json, sheets of the drawings beside the real pictures, and figures
    """
    setting = evaluation.Setting(steps, guidance, sampler, seed)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        _check_writable(out / "scores.json", (".json",))
    if composition:
        things, sd = _corpus(scenes), load(model, device)
        evaluation.report(evaluation.evaluate_composition(sd, things, setting, count), setting, out)
        return
    corpus, sd = _corpus(data), load(model, device)
    towers = _towers(clip or model, "the scores need")
    evaluation.report(evaluation.evaluate(evaluation.Evaluator(sd, corpus, towers, count), setting), setting, out)


def info(path: Positional[str], variant: str | None = None) -> None:
    """Describe a file of weights or a model folder.

    Args:
        path: a .safetensors or .ckpt file, a folder, "emoji" or "tiny"
        variant: which weights of a diffusers folder, such as fp16
    """
    print(printable(describe(path, variant)))


def verify(
    path: Positional[str], config: Path | None = None, out: Path = Path("verify.png"), device: str | None = None
) -> None:
    """Compare a CompVis file with diffusers, layer by layer, draw a picture, and print a report to be sent to us.

    Args:
        path: a .safetensors or .ckpt file
        config: its YAML; if left out, the one beside it, or that of SD v1
        out: the picture
        device: where it is drawn: "cuda", "mps" or "cpu"; the fastest if left out
    """
    _check_writable(out, (".png",))
    print(verify_file(path, out, config, device))


def convert(
    source: Positional[str],
    target: Positional[Path],
    layout: Layout | None = None,
    config: Path | None = None,
    use_ema: bool | None = None,
    variant: str | None = None,
    ignore: tuple[str, ...] = (),
    dtype: Dtype = "fp32",
) -> None:
    """Read a model in one layout and write it in another.

    Args:
        source: anything that --model of txt2img takes
        target: a folder; or, for CompVis, a file .safetensors or .ckpt
        layout: if left out, compvis for a file, else minisd
        config: the YAML of a CompVis file; if left out, the one beside it, or that of SD v1
        use_ema: whether to take the EMA weights of a CompVis file; if left out, its YAML decides
        variant: which weights of a diffusers folder, such as fp16
        ignore: names of superfluous tensors in a CompVis file, which are left out
        dtype: of the numbers in the file
    """
    sd = load(source, "cpu", DTYPES[dtype], config=config, use_ema=use_ema, variant=variant, ignore=ignore)
    save(sd, target, layout)
    print(f"wrote {target}")


# --- the commands together --------------------------------------------------------------------------------------------


def one_of(**commands: Callable):
    """A type for tyro: one of these commands, which is called with its arguments."""
    return Union[*(Annotated[Any, tyro.conf.subcommand(name, constructor=f)] for name, f in commands.items())]


def commands(preset: Preset | None = None, init: str | None = None, decoder_only: bool = True):
    """A type for tyro: one of all commands.

    These three arguments are read first, because the defaults of a training's other flags follow from them: they are
    the recipes of the preset, or the recipes for a finished model (`--init`).
    """
    if init and preset and decoder_only:
        raise ValueError(f"the sizes of the networks are those of {init}: leave --preset out")
    name = preset or "emoji"
    folders = {"tiny": ("shapes",), "emoji-64": ("emoji", "scenes")}.get(name, ("emoji",))
    run = Run(tuple(Path("data", folder) for folder in folders), Path("runs", "finetuned" if init else name))
    vae = recipes.FINETUNE_DECODER if init and decoder_only else recipes.VAE[name]
    unet, condition = (recipes.FINETUNE, None) if init else (recipes.UNET[name], "captions")
    networks = one_of(
        clip=partial(train_clip, preset=name, run=run, recipe=recipes.CLIP[name]),
        vae=partial(train_vae, preset=preset if init else name, run=run, recipe=vae),
        unet=partial(train_unet, preset=name, run=run, recipe=unet, condition=condition),
        lora=partial(train_lora, run=run, recipe=recipes.LORA, init=init or name),
        token=partial(train_token, run=run, recipe=recipes.TOKEN, init=init or name),
    )
    corpora = one_of(emoji=data_emoji, scenes=data_scenes, shapes=data_shapes, hub=data_hub)

    def data(corpus: corpora) -> None:
        """Make a corpus of captioned pictures."""

    def train(network: networks) -> None:
        """Train a model from scratch, first clip and vae, then unet; or continue from a finished one (--init)."""

    return one_of(
        txt2img=txt2img, img2img=img2img, inpaint=inpaint, page=page, data=data, train=train, evaluate=evaluate,
        info=info, verify=verify, convert=convert,
    )  # fmt: skip


def _file_and_strength(given: str) -> tuple[str, float]:
    """FILE:0.8 → ("FILE", 0.8). A colon that no number follows belongs to the name."""
    file, _, strength = given.rpartition(":")
    try:
        return file, float(strength)
    except ValueError:
        return given, 1.0


def _check_writable(path: Path, suffixes: tuple[str, ...]) -> None:
    if not os.access(path.absolute().parent, os.W_OK) or not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.absolute().parent} to write {path.name} into")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} should end in {' or '.join(suffixes)}")
    new = not os.path.lexists(path)
    try:
        path.open("ab").close()  # changes nothing in a file that is there
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): give another path") from None
    if new:
        path.unlink()


def _write(path: Path, save: Callable[[Path], None]) -> None:
    with files.folder_written_whole(path, into=path.parent) as unfinished:
        save(unfinished / path.name)  # a name with the same ending, which says the format
    print(f"wrote {path}")


def _corpus(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no corpus at {folder}: `minisd data emoji` or `minisd data shapes` makes one, or give a folder "
            "of your own pictures"
        )
    return folder


def _towers(path: str | Path, needed: str, instead: str = "") -> tuple[CLIPModel, BPETokenizer]:
    """Both towers of CLIP and their tokenizer. needed: what for; instead: what else can be done."""
    try:
        return load_clip(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} has no image tower, which {needed} ({error}): name a folder that has one by --clip, such as emoji "
            f"or a run of `minisd train clip`{instead}"
        ) from None


def main(arguments: list[str] | None = None) -> None:
    """Run a command. If the user made a mistake, print one sentence instead of a traceback."""
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        one_command, _ = tyro.cli(commands, args=arguments, return_unknown_args=True, add_help=False)
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"note: {printable(message)}", file=sys.stderr)
            with enough_memory("ask for fewer or smaller things (--num-images, --height, --scale, --count, --size)"):
                tyro.cli(one_command, prog="minisd", args=arguments, config=flat)  # calls the command's function
    except (KeyboardInterrupt, FloatingPointError) as stop:
        # all processes of a training stop together, so only one of them prints the reason
        sys.exit(f"\nminisd: {str(stop) or 'stopped'}" if os.environ.get("RANK", "0") == "0" else 1)
    except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
        sys.exit(f"minisd: {printable(error)}")
