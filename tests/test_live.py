"""The live page: the engine in JavaScript, in a headless Chromium, draws what minisd draws.

Two kinds of tests. Most call the engine's functions in the page itself, and compare numbers with torch. Those about
drawing go the way of a reader: MinisdEngine, which runs the engine in a worker. Firefox: see live_in_firefox.py.
"""

import base64
import hashlib
import json
import math
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import served

import minisd
from minisd import live, sampling
from minisd.clip import CLIPTextConfig
from minisd.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minisd.noising import NoiseSchedule, randn
from minisd.tokenizer import BPETokenizer
from minisd.unet import UNetConfig
from minisd.vae import AutoencoderConfig

WEIGHTS = Path(minisd.__file__).parent / "weights"
FOLDER = Path(live.__file__).parent
MOST_LINES = 900  # of code, in the engine's files

# Everything that a config can say and that `tiny` and `emoji` do not: sides that halve to odd numbers, a fixed number
# of heads, two transformers in a row, attention in the autoencoder, and widths that are no multiples of 4 or 8.
ODD = LatentDiffusionConfig(
    unet=UNetConfig(
        in_channels=5, out_channels=5, model_channels=32, channel_mult=(1, 2, 2), attention_resolutions=(1, 4),
        num_res_blocks=1, num_heads=4, transformer_depth=2, context_dim=18,
    ),
    first_stage=AutoencoderConfig(
        ch=32, ch_mult=(1, 2), num_res_blocks=2, z_channels=3, embed_dim=5, resolution=32, attn_resolutions=(16,)
    ),
    cond_stage=CLIPTextConfig(vocab_size=640, max_length=13, width=18, layers=2, heads=3, projection_dim=18),
    image_size=20, scale_factor=0.3, timesteps=500, beta_schedule="linear", parameterization="v",
)  # fmt: skip


# --- files ------------------------------------------------------------------------------------------------------------


def code_lines(text: str) -> int:
    """Lines of JavaScript that are neither blank nor a comment."""
    lines = [line.strip() for line in text.splitlines()]
    return sum(bool(line) and not line.startswith("//") for line in lines)


def test_the_engine_stays_small():
    assert sum(code_lines(file.read_text("utf-8")) for file in map(FOLDER.joinpath, live.SCRIPTS)) <= MOST_LINES


def test_every_script_is_listed_and_loaded():
    scripts = [name for name in [*live.SCRIPTS, *live.PAGE] if name.endswith(".js")]
    assert sorted(scripts) == sorted(file.name for file in FOLDER.glob("*.js"))
    page = (FOLDER / "index.html").read_text("utf-8")
    places = [page.index(f'src="{name}"') for name in scripts]
    assert places == sorted(places)


def test_the_assembled_kernel_is_that_of_the_source():
    """gemm.js names the gemm.wat that its bytes were made from. If this fails, assemble it again, as it says there."""
    source = hashlib.sha256((FOLDER / "gemm.wat").read_bytes()).hexdigest()
    assert source in (FOLDER / "gemm.js").read_text("utf-8")


# --- a page with the engine -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the page, whose model is `tiny` as scripts; and beside it the models as folders."""
    folder = tmp_path_factory.mktemp("site")
    live.write_page(WEIGHTS / "tiny", folder)
    for name in ("tiny", "emoji"):
        (folder / name).symlink_to(WEIGHTS / name, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def odd(site, randomise, tokenizer):
    """The model of `ODD`, with random weights, saved beside the others."""
    sd = randomise(LatentDiffusion(ODD, tokenizer)).eval()
    minisd.save(sd, site / "odd", layout="minisd")
    return sd


@pytest.fixture(scope="module")
def server(site):
    with served(site) as address:
        yield address


# What the tests call in the page. `live` is the engine without its worker, `models` what has been opened.
HELPERS = """() => {
    globalThis.live = minisdLive.slice(0, -1).reduce((live, part) => ({ ...live, ...part(live) }), {});
    globalThis.numbers = (array) => Array.from(array);
    // Another model takes the place of the one before, as in the worker.
    globalThis.openModel = async (folder) => {
        const text = async (name) => (await fetch(`${folder}/${name}`)).text();
        const json = async (name) => JSON.parse(await text(name));
        const tokenizer = { vocab: await json("tokenizer/vocab.json"), merges: await text("tokenizer/merges.txt") };
        const weights = await (await fetch(`${folder}/model.safetensors`)).arrayBuffer();
        globalThis.sd = new live.LatentDiffusion(await json("config.json"), tokenizer, [weights]);
    };
}"""


@pytest.fixture(scope="module")
def page(browser, server):
    """A page that has the engine's functions, to be called one by one."""
    page = browser.new_page()
    page.goto(f"{server}/index.html")
    page.evaluate(HELPERS)
    yield page
    page.close()


@pytest.fixture(scope="module")
def reader(browser, server):
    """A page in which `tiny` has been loaded into the worker, and what it asked the network for."""
    page, requests = browser.new_page(), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{server}/index.html")
    page.evaluate("async () => { globalThis.engine = new MinisdEngine('tiny'); await engine.load(); }")
    yield page
    page.close()
    assert all(url.startswith((server + "/", "blob:" + server)) for url in requests), requests


@pytest.fixture(scope="module")
def tiny():
    return minisd.load("tiny", "cpu")


def error(ours, theirs: torch.Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    ours = torch.tensor(ours).reshape(theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_sources_run_as_written(page):
    assert page.evaluate("live.simd"), "this Chromium has WebAssembly SIMD, so the assembled kernel must start"


# --- noise and schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32 + 7, 2**53 - 1, -3])
def test_noise_is_torchs(page, seed):
    """Several draws from one generator, because fewer than 16 numbers are drawn in another way, and in pairs."""
    counts = [1, 3, 15, 16, 2, 17, 31, 256, 1, 1024, 40]
    ours = page.evaluate(
        """([seed, counts]) => {
            const generator = new live.Generator(seed);
            return counts.map((n) => numbers(live.randn(n, generator)));
        }""",
        [seed, counts],
    )
    generator = torch.Generator().manual_seed(seed)
    for n, drawn in zip(counts, ours, strict=True):
        assert (torch.tensor(drawn) - randn((n,), generator)).abs().max() <= 3e-6, n


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_schedule_is_the_same(page, kind):
    for T in (1000, 100, 7):
        config = LatentDiffusionConfig(beta_schedule=kind, timesteps=T)
        theirs = config.schedule()._alphas_cumprod
        fields = {name: getattr(config, name) for name in ("beta_schedule", "linear_start", "linear_end", "timesteps")}
        ours = page.evaluate("(config) => numbers(live.NoiseSchedule.from(config).alphas_cumprod)", fields)
        assert ours == pytest.approx(theirs, rel=1e-13)


def test_timesteps_are_the_same(page):
    cases = [(n, T, how) for T in (1000, 50) for n in [*range(1, 51), 333, 999, 1000] if n <= T
             for how in ("leading", "linspace", "trailing")]  # fmt: skip
    ours = page.evaluate("(cases) => cases.map((each) => live.make_timesteps(...each))", cases)
    assert ours == [sampling.make_timesteps(*each) for each in cases]
    strengths = [(list(range(n, 0, -1)), s) for n in (1, 10, 25, 50) for s in (0.2, 0.29, 0.5, 0.75, 1) if n * s >= 1]
    ours = page.evaluate("(cases) => cases.map((each) => live.remaining_timesteps(...each))", strengths)
    assert ours == [sampling.remaining_timesteps(*each) for each in strengths]


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler"])
def test_samplers_take_the_same_steps(page, name):
    """With an ε that is a plain function of x and t, instead of a network."""
    schedule, x_T = NoiseSchedule.scaled_linear(), torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 14, 15, 25):
        theirs = sampling.SAMPLERS[name](
            lambda x, t: torch.sin(3 * x + t[0] / 100), x_T.double(), schedule, steps=steps
        )
        theirs = list(theirs)
        ours = page.evaluate(
            """([name, x, steps]) => {
                const schedule = live.NoiseSchedule.from({});
                const timesteps = live.make_timesteps(steps, 1000, live.SAMPLERS[name].spacing);
                const eps = (x, t) => ({ eps: x.map((v) => Math.sin(3 * v + t / 100)) });
                const made = [...live.sample(name, eps, Float64Array.from(x), schedule, timesteps)];
                return made.map(({ t, x0, x }) => ({ t, x0: numbers(x0), x: numbers(x) }));
            }""",
            [name, x_T[0].tolist(), steps],
        )
        assert [step["t"] for step in ours] == [step.t for step in theirs]
        for step, reference in zip(ours, theirs, strict=True):
            assert error(step["x0"], reference.x0[0].float()) < 1e-5
            assert error(step["x"], reference.x[0].float()) < 1e-5


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def fuzzed_texts(count: int = 1000) -> list[str]:
    """Texts of everything that a tokenizer has stumbled over, the same in each run."""
    pick = random.Random(0)
    special = ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "!<|StartOfText|>!", "<|end", "'s", "'LL", "''ve"]
    spaces = [" ", "  ", "\t", "\n", "\r\n", "\u0085", "\u00a0", "\u2003", "\u3000", "\ufeff", "\u200b", "\u200d"]
    letters = ["Σ", "ΑΣ", "İ", "ẞ", "e\u0301", "\u0301", "한", "각", "ﬁ", "Å", "\u212b", "ǅ", "क्षि", "日本語"]
    letters += ["狐狸", "红色的"]
    signs = ["🦊", "👩‍🚒", "🏳️‍🌈", "🇩🇪", "１２", "½", "Ⅷ", "٣", "²", "…", "—", "\x00", "\x7f", "\u00ad", "😀!", "#1"]
    words = ["a", "Red", "fox", "noto", "style", "circle,", "it's", "10 o'clock", "naïve", "Curaçao", "unbelievably"]
    texts = []
    for _ in range(count):
        parts = [
            pick.choice(pick.choice([special, spaces, letters, signs, words, words])) for _ in range(pick.randint(0, 9))
        ]
        if pick.random() < 0.3:
            code = pick.choice([pick.randint(0, 0xFFF), pick.randint(0x1000, 0xD7FF), pick.randint(0x10000, 0x1FFFF)])
            if unicodedata.category(chr(code)) != "Cn":  # letters that are not assigned yet may be in a newer table
                parts.insert(pick.randint(0, len(parts)), chr(code))
        texts.append(pick.choice(["", " "]).join(parts))
    return texts


@pytest.mark.parametrize("name", ["tiny", "emoji", "clip"])
def test_tokenizer_gives_the_same_ids(page, name, tmp_path):
    theirs = BPETokenizer.clip() if name == "clip" else BPETokenizer.load(WEIGHTS / name / "tokenizer")
    theirs.save(tmp_path, max_length=77)
    files = {"vocab": json.loads((tmp_path / "vocab.json").read_text("utf-8"))}
    files |= {"merges": (tmp_path / "merges.txt").read_text("utf-8")}
    texts = fuzzed_texts()
    ours = page.evaluate(
        """([files, texts]) => {
            const tokenizer = new live.BPETokenizer(files);
            return texts.map((text) => [77, 12].map((length) => tokenizer.encode(text, length).ids));
        }""",
        [files, texts],
    )
    whole, cut = theirs(texts, 77).ids.tolist(), theirs(texts, 12).ids.tolist()
    different = [(text, a, b) for text, (a, _), b in zip(texts, ours, whole, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(texts)}, such as {different[:3]}"
    assert [b for _, b in ours] == cut


def test_tokens_are_named_and_the_rest_is_told(page):
    page.evaluate("openModel('emoji')")
    tokens = page.evaluate("sd.cond_stage_model.tokenizer.encode('A red Fox, noto style', 7)")
    assert tokens["pieces"] == ["<start>", "a", "red", "fox", ",", "noto", "<end>"]
    assert tokens["lost"] == "style"
    short = page.evaluate("sd.cond_stage_model.tokenizer.encode('fox', 5)")
    assert short["pieces"] == ["<start>", "fox", "<end>", "<pad>", "<pad>"] and short["lost"] == ""


def test_another_padding_token_is_used(page, tokenizer, tmp_path):
    BPETokenizer(tokenizer.vocab, tokenizer.merges, pad="!").save(tmp_path, max_length=5)
    names = {"vocab": "vocab.json", "config": "tokenizer_config.json"}
    files = {key: json.loads((tmp_path / name).read_text("utf-8")) for key, name in names.items()}
    files["merges"] = (tmp_path / "merges.txt").read_text("utf-8")
    ids = page.evaluate("(files) => new live.BPETokenizer(files).encode('a', 5).ids", files)
    assert ids[-2:] == [tokenizer.vocab["!"]] * 2


# --- the networks -----------------------------------------------------------------------------------------------------

NETWORKS = """([prompts, x, shape, timesteps, pixels, side]) => {
    const contexts = sd.get_learned_conditioning(prompts);
    const encoded = sd.encode_first_stage(Float32Array.from(pixels), side, side);
    return {
        context: contexts.map(numbers),
        eps: timesteps.map((t) => sd.apply_model(Float32Array.from(x), shape, t, contexts).predictions.map(numbers)),
        decoded: numbers(sd.decode_first_stage([Float32Array.from(x)], shape)[0]),
        mean: numbers(encoded.mean),
        logvar: numbers(encoded.logvar),
    };
}"""


@pytest.mark.parametrize("name", ["tiny", "emoji", "odd"])
def test_networks_are_torchs(page, name, odd):
    sd = odd if name == "odd" else minisd.load(name, "cpu")
    generator = torch.Generator().manual_seed(0)
    shape, side = sd.latent_shape(), sd.config.image_size
    x, pixels = torch.randn(1, *shape, generator=generator), torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    prompts, timesteps = ["", "a red fox, noto style"], [sd.schedule.timesteps - 1, 300, 1, 0]

    page.evaluate(f"openModel('{name}')")
    given = [prompts, x.flatten().tolist(), shape, timesteps, pixels.flatten().tolist(), side]
    ours = page.evaluate(NETWORKS, given)

    with torch.no_grad():
        context = sd.get_learned_conditioning(prompts)
        assert error(ours["context"], context.transpose(1, 2)) < 1e-5
        for t, eps in zip(timesteps, ours["eps"], strict=True):
            assert error(eps, sd.apply_model(x.expand(2, -1, -1, -1), torch.tensor([t, t]), context)) < 1e-5, t
        assert error(ours["decoded"], sd.decode_first_stage(x)) < 1e-5
        posterior = sd.encode_first_stage(pixels)
        assert error(ours["mean"], posterior.mean) < 1e-5
        assert error(ours["logvar"], posterior.logvar) < 1e-5


@pytest.mark.parametrize(("h", "w"), [(3, 2), (2, 3), (1, 7), (9, 3)])
def test_the_smallest_maps_are_computed_right(page, odd, h, w):
    """Where a map has a single column, neighbours in the matrix of patches are no neighbours in memory."""
    x = torch.randn(1, 5, h, w, generator=torch.Generator().manual_seed(0))
    page.evaluate("openModel('odd')")
    ours = page.evaluate(
        """([x, shape]) => {
            const contexts = sd.get_learned_conditioning(["a fox"]);
            return numbers(sd.apply_model(Float32Array.from(x), shape, 9, contexts).predictions[0]);
        }""",
        [x.flatten().tolist(), [5, h, w]],
    )
    with torch.no_grad():
        theirs = odd.apply_model(x, torch.tensor([9]), odd.get_learned_conditioning(["a fox"]))
    # The deepest map has one pixel, so a group of a norm has two numbers. If they are nearly equal, the norm multiplies
    # rounding errors. A wrong neighbour would be off by much more than this.
    assert error(ours, theirs) < 1e-4


def test_attention_maps_are_the_recorded_ones(page, odd):
    with minisd.record_attention(odd) as maps:
        odd.txt2img("a red fox, noto style", steps=3, guidance_scale=4.0, seed=1)
    page.evaluate("openModel('odd')")
    steps = page.evaluate(
        """() => {
            const options = { prompt: "a red fox, noto style", steps: 3, guidance: 4, seed: 1, attention: true };
            const told = ({ h, w, weights }) => ({ h, w, weights: numbers(weights) });
            return [...sd.draw(options)].slice(1).map(({ attention }) =>
                Object.fromEntries(Object.entries(attention).map(([name, map]) => [name, told(map)])));
        }"""
    )
    assert [list(step) for step in steps] == [maps.layers] * 3
    for i, step in enumerate(steps):
        for layer, ours in step.items():
            theirs = maps.at(i, layer, size=(ours["h"], ours["w"]))
            assert (torch.tensor(ours["weights"]).reshape(theirs.shape) - theirs).abs().max() < 1e-5


def test_a_hidden_word_is_read_by_nobody(page):
    """What all pixels read of the other tokens adds up to 1. The empty prompt's half of the batch stays as it was."""
    page.evaluate("openModel('tiny')")
    shown, hidden = page.evaluate(
        """() => [[], [2, 3]].map((hide) => {
            const options = { prompt: "a red circle", steps: 1, guidance: 4, attention: true, hide };
            const step = [...sd.draw(options)][1];
            const { h, w, weights } = Object.values(step.attention)[0];
            const [cond, uncond] = [step.eps_cond, step.eps_uncond].map(numbers);
            return { size: h * w, weights: numbers(weights), cond, uncond };
        })"""
    )
    read = np.array(hidden["weights"]).reshape(-1, hidden["size"])
    assert (read[[2, 3]] == 0).all() and read.sum(0) == pytest.approx(1)
    assert hidden["uncond"] == shown["uncond"] and hidden["cond"] != shown["cond"]


def test_activations_are_what_the_blocks_return(page, odd):
    x = torch.randn(1, *odd.latent_shape(), generator=torch.Generator().manual_seed(0))
    page.evaluate("openModel('odd')")
    ours = page.evaluate(
        """([x, shape]) => {
            const contexts = sd.get_learned_conditioning(["a fox"]);
            const { activations } = sd.apply_model(Float32Array.from(x), shape, 9, contexts, { activations: true });
            const told = ({ c, h, w, values }) => ({ shape: [c, h, w], values: numbers(values) });
            return Object.fromEntries(Object.entries(activations).map(([name, map]) => [name, told(map)]));
        }""",
        [x.flatten().tolist(), odd.latent_shape()],
    )
    theirs, unet = {}, odd.model.diffusion_model
    blocks = {name: module for name, module in unet.named_modules() if name in ours}
    hooks = [
        m.register_forward_hook(lambda _m, _a, out, name=name: theirs.update({name: out})) for name, m in blocks.items()
    ]
    with torch.no_grad():
        odd.apply_model(x, torch.tensor([9]), odd.get_learned_conditioning(["a fox"]))
    for hook in hooks:
        hook.remove()
    assert len(ours) == len(theirs) == 2 + len(unet.input_blocks) + len(unet.output_blocks)
    for name, out in theirs.items():
        assert ours[name]["shape"] == [*out.shape[1:], 1, 1][:3]
        assert error(ours[name]["values"], out) < 1e-5, name


def test_memory_does_not_grow_from_drawing_to_drawing(page):
    """Also not after a drawing that nobody saw to its end, and after an error."""
    page.evaluate("openModel('tiny')")
    sizes = page.evaluate(
        """() => [0, 1, 2, 3].map(() => {
            [...sd.draw({ prompt: "a", steps: 2, attention: true, activations: true })];
            for (const step of sd.draw({ prompt: "a", steps: 9 })) if (step.i === 1) break;
            try { sd.decode_first_stage([new Float32Array(256)], [9, 8, 8]); } catch {}
            return live.memory.buffer.byteLength;
        })"""
    )
    assert len(set(sizes)) == 1


# --- drawing, as a reader does ----------------------------------------------------------------------------------------

DRAW = """async (options) => {
    const steps = [];
    const step = ({ i, t, pictures }) => steps.push({ i, t, shown: pictures && numbers(pictures.x0.rgba) });
    globalThis.numbers = (array) => Array.from(array);
    if (options.init) options.init.rgba = Uint8ClampedArray.from(options.init.rgba);
    const drawn = await engine.draw(options, { step });
    return drawn && { steps, rgba: numbers(drawn.picture.rgba), width: drawn.picture.width };
}"""


def off(ours: list[int], image) -> int:
    """By how much the two pictures differ at most, of 255."""
    pixels = np.array(ours).reshape(image.height, image.width, 4)
    assert (pixels[..., 3] == 255).all()
    return int(np.abs(pixels[..., :3] - np.asarray(image).astype(int)).max())


CASES = [
    {"prompt": "a red circle", "sampler": "ddim", "steps": 10, "guidance": 7.5, "seed": 0},
    {"prompt": "two blue squares", "negative": "red", "sampler": "dpmpp_2m", "steps": 16, "guidance": 4, "seed": 123},
    {"prompt": "a yellow star above a heart", "sampler": "euler", "steps": 12, "guidance": 2.5, "seed": 2**32 + 9},
    {"prompt": "<b>a</b> & 狐", "sampler": "dpmpp_2m", "steps": 5, "guidance": 1, "seed": 3},
]


def python_options(case: dict) -> dict:
    named = {"guidance": "guidance_scale", "negative": "negative_prompt"}
    return {named.get(key, key): float(value) if key == "guidance" else value for key, value in case.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["sampler"])
def test_tiny_draws_the_same_picture(reader, tiny, case):
    theirs = tiny.txt2img(**python_options(case))
    ours = reader.evaluate(DRAW, case | {"preview": 4})
    assert off(ours["rgba"], theirs.images[0]) <= 1
    assert [step["t"] for step in ours["steps"]] == [step.t for step in theirs.trajectory.steps]
    shown = [i for i, step in enumerate(ours["steps"]) if step["shown"]]
    assert shown == list(range(3, case["steps"], 4))
    if shown:
        assert off(ours["steps"][shown[0]]["shown"], theirs.trajectory.x0_images()[shown[0]][0]) <= 1


def test_emoji_draws_the_same_picture(browser, server):
    page = browser.new_page()
    page.goto(f"{server}/index.html")
    seen = page.evaluate(
        """async () => {
            globalThis.engine = new MinisdEngine("emoji");
            const seen = [];
            await engine.load((received, total) => seen.push([received, total]));
            return seen;
        }"""
    )
    assert seen[-1][0] == seen[-1][1] == (WEIGHTS / "emoji" / "model.safetensors").stat().st_size
    case = {"prompt": "a grinning cat, noto style", "sampler": "dpmpp_2m", "steps": 8, "guidance": 4, "seed": 5}
    ours = page.evaluate(DRAW, case)
    assert off(ours["rgba"], minisd.load("emoji", "cpu").txt2img(**python_options(case)).images[0]) <= 1
    page.close()


@pytest.mark.parametrize(("side", "strength"), [(32, 0.6), (48, 1)])
def test_a_picture_is_drawn_over_the_same_way(reader, tiny, side, strength):
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    case = {"prompt": "a green heart", "sampler": "ddim", "steps": 10, "guidance": 3, "seed": 4}
    rgba = np.asarray(picture.convert("RGBA")).flatten().tolist()
    init = {"rgba": rgba, "width": side, "height": side, "strength": strength}
    ours = reader.evaluate(DRAW, case | {"init": init})
    theirs = tiny.img2img(image=picture, strength=strength, **python_options(case))
    assert len(ours["steps"]) == math.floor(10 * strength)
    assert off(ours["rgba"], theirs.images[0]) <= 1


def test_a_page_opened_as_a_file_draws_the_same_picture(browser, site, tiny):
    """With nothing but scripts: a page like this may not fetch its own files."""
    page, requests = browser.new_page(), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.evaluate("engine.load()")
    assert off(page.evaluate(DRAW, CASES[0])["rgba"], tiny.txt2img(**python_options(CASES[0])).images[0]) <= 1
    assert all(url.startswith(("file:", "blob:")) for url in requests)

    page.fill("[name=prompt]", "a red circle")
    page.click("text=Draw")
    page.wait_for_function("/^Drawn on/.test(document.querySelector('[role=status]').textContent)")
    page.close()


def test_base64_is_read_in_an_older_browser_too(reader):
    """One without Uint8Array.fromBase64."""
    text = base64.b64encode(bytes(range(256))).decode()
    old = "delete Uint8Array.fromBase64; return Array.from(MinisdEngine.bytes(text))"
    assert reader.evaluate("(text) => Array.from(MinisdEngine.bytes(text))", text) == list(range(256))
    assert reader.evaluate(f"(text) => {{ {old} }}", text) == list(range(256))


def test_without_webassembly_the_picture_is_the_same(browser, server, tiny):
    page = browser.new_page()
    page.add_init_script("delete globalThis.WebAssembly")
    page.goto(f"{server}/index.html")
    start = "async (plain) => { globalThis.engine = new MinisdEngine('tiny', { plain }); return engine.load(); }"
    assert not page.evaluate(start, True)["simd"]
    case = CASES[0] | {"steps": 2}
    assert off(page.evaluate(DRAW, case)["rgba"], tiny.txt2img(**python_options(case)).images[0]) <= 1
    page.close()


def test_the_autoencoder_answers_alone(reader, tiny):
    """What it makes of a picture, a latent decoded, and a picture with transparent parts, which become white."""
    rgba = np.random.default_rng(1).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    rgba[..., 3] = np.where(np.arange(32) < 16, 0, 255)
    ours = reader.evaluate(
        """async (rgba) => {
            const picture = { rgba: Uint8ClampedArray.from(rgba), width: 32, height: 32 };
            const { z, shape, picture: made } = await engine.ask("autoencode", picture);
            const { pictures } = await engine.ask("decode", { latents: [z], shape });
            return [made, pictures[0]].map(({ rgba }) => Array.from(rgba));
        }""",
        rgba.flatten().tolist(),
    )
    from PIL import Image

    from minisd.pictures import read_picture, to_pil

    x = read_picture(Image.fromarray(rgba))
    with torch.no_grad():
        theirs = to_pil(tiny.first_stage_model.decode(tiny.encode_first_stage(x).mode()))[0]
    assert off(ours[0], theirs) <= 1
    assert off(ours[1], theirs) <= 1


# --- when something is in the way -------------------------------------------------------------------------------------


def test_a_drawing_can_be_cancelled(reader, tiny):
    """Also one that waits for its turn; what was asked for after them is drawn."""
    steps, answers = reader.evaluate(
        """async () => {
            let steps = 0;
            const options = { prompt: "a", steps: 1000 };
            const first = engine.draw(options, { step: () => { if (++steps === 2) engine.cancel(); } });
            const second = engine.draw(options);
            const answers = await Promise.all([first, second]);
            return [steps, answers];
        }"""
    )
    assert answers == [None, None] and steps < 20
    assert off(reader.evaluate(DRAW, CASES[0])["rgba"], tiny.txt2img(**python_options(CASES[0])).images[0]) <= 1


def test_other_requests_are_answered_between_the_steps(reader):
    order = reader.evaluate(
        """async () => {
            const order = [];
            const drawing = engine.draw({ prompt: "a", steps: 30 }).then(() => order.push("drawn"));
            await engine.ask("tokenize", { prompt: "a red circle" }).then(({ pieces }) => order.push(pieces[2]));
            await drawing;
            return order;
        }"""
    )
    assert order == ["red", "drawn"]


REFUSED = {
    'There is no sampler "plms", only ddim,dpmpp_2m,euler.': "engine.draw({ prompt: 'a', sampler: 'plms' })",
    "There can be 1 to 1000 steps, not 0.": "engine.draw({ prompt: 'a', steps: 0 })",
    "There can be 1 to 1000 steps, not 2.5.": "engine.draw({ prompt: 'a', steps: 2.5 })",
    "At strength 0.1, none of 5 steps is made: raise one of them.": (
        "engine.draw({ prompt: 'a', steps: 5, init: { rgba: new Uint8Array(4096), width: 32, height: 32, "
        "strength: 0.1 } })"
    ),
    "A picture's sides must be multiples of 4: 32×30.": (
        "engine.draw({ prompt: 'a', init: { rgba: new Uint8Array(3840), width: 30, height: 32, strength: 1 } })"
    ),
    'The engine knows no message "paint": see worker.js.': "engine.ask('paint')",
    "There is no nowhere/model.js.": "new MinisdEngine('nowhere').load()",
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_errors_reach_the_page_as_a_sentence(reader, sentence):
    asked = f"async () => {{ try {{ await {REFUSED[sentence]}; }} catch (error) {{ return error.message; }} }}"
    assert reader.evaluate(asked) == sentence


def test_a_broken_model_is_named(reader, site):
    def message(folder: str) -> str:
        load = f"new MinisdEngine('{folder}').load()"
        return reader.evaluate(f"async () => {{ try {{ await {load}; }} catch (error) {{ return error.message; }} }}")

    for name in ("cut", "classes", "lacking"):
        shutil.copytree(WEIGHTS / "tiny", site / name)
    weights = site / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert message("cut") == "The weights are no whole .safetensors file (it ends too early). Fetch them again."

    config = json.loads((WEIGHTS / "tiny" / "config.json").read_text("utf-8"))
    changed = config | {"cond_stage": {"kind": "ClassEmbedderConfig"}}
    (site / "classes" / "config.json").write_text(json.dumps(changed))
    assert message("classes") == "The page needs a model whose cond_stage is a CLIPTextConfig, and this one's is not."

    weights = site / "lacking" / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"time_embed.2.weight", b"time_embed.X.weight"))
    use = "const e = new MinisdEngine('lacking'); await e.load(); await e.draw({ prompt: 'a' });"
    with pytest.raises(Exception, match=r"The weights have no model\.diffusion_model\.time_embed\.2\.weight, which"):
        reader.evaluate(f"async () => {{ {use} }}")


def test_loading_can_be_tried_again(reader, site):
    load = "async () => { try { return await later.load(); } catch (error) { return error.message; } }"
    reader.evaluate("() => { globalThis.later = new MinisdEngine('later'); }")
    assert reader.evaluate(load) == "There is no later/model.js."
    (site / "later").symlink_to(WEIGHTS / "tiny", target_is_directory=True)
    assert reader.evaluate(load)["type"] == "ready"


def test_an_old_browser_is_told_so(browser, server):
    page = browser.new_page()
    page.add_init_script("delete globalThis.Worker")
    page.goto(f"{server}/index.html")
    page.click("text=Draw")
    page.wait_for_function("document.querySelector('[role=status]').textContent.includes('newer')")
    said = page.inner_text("[role=status]")
    assert said == "This browser is too old for the model: use a newer one."
    page.close()
