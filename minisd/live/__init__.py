"""The live page: Stable Diffusion in JavaScript, running in the reader's browser. It draws the picture of `txt2img`.

The engine's files are read beside the modules of the same names: noising.js, tokenizer.js, clip.js, attention.js,
unet.js, vae.js, sampling.js, latent_diffusion.js. Below them are layers.js (convolution, norms), gemm.js with gemm.wat
(the matrix product, in WebAssembly) and safetensors.js; above them worker.js (the messages, explained at its top) and
live.js, which is what a page uses. The page itself is index.html with page.js, page.css and figures.js.
"""

import base64
import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
# In the order in which a page has to load them: each uses those before it.
SCRIPTS = [
    f"{name}.js"
    for name in (
        "gemm", "layers", "attention", "unet", "clip", "vae", "noising", "sampling", "safetensors", "tokenizer",
        "latent_diffusion", "worker", "live",
    )
]  # fmt: skip
PAGE = ["figures.js", "page.js", "page.css", "tour.js", "tour.css", "index.html"]
PIECE = 3 << 20  # bytes of the weights in one script, a multiple of 3 so that base64 needs no padding in between


def write_model_scripts(model: Path, folder: Path) -> None:
    """Write a minisd folder as scripts, which a page can load where it may not fetch: from a file.

    model.js holds the configuration and the tokenizer, and weights_0.js, weights_1.js … the weights in base64.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    tokenizer, special = model / "tokenizer", model / "tokenizer" / "tokenizer_config.json"
    weights = (model / "model.safetensors").read_bytes()
    pieces = [weights[i : i + PIECE] for i in range(0, len(weights), PIECE)]
    tokens = {
        "vocab": json.loads((tokenizer / "vocab.json").read_text("utf-8")),
        "merges": (tokenizer / "merges.txt").read_text("utf-8"),
        "config": json.loads(special.read_text("utf-8")) if special.exists() else None,
    }
    scripts = {"model.js": {"config": config, "tokenizer": tokens, "pieces": len(pieces)}}
    scripts |= {f"weights_{i}.js": base64.b64encode(piece).decode() for i, piece in enumerate(pieces)}
    for name, content in scripts.items():
        (folder / name).write_text(f"globalThis.minisdModel = {json.dumps(content)};\n", "utf-8")


def write_page(model: Path, folder: Path) -> None:
    """Write a folder that draws with this model, opened as a file or served."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    for name in [*SCRIPTS, *PAGE]:
        shutil.copyfile(HERE / name, folder / name)
    # A script, because a page that was opened as a file may not fetch.
    texts = (HERE / "tour.json").read_text("utf-8")
    (folder / "tour_texts.js").write_text(f"globalThis.minisdTour = {texts.strip()};\n", "utf-8")
    write_model_scripts(model, folder / "model")
