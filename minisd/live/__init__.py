"""The live page: Stable Diffusion in JavaScript, running in the reader's browser. It draws the picture of `txt2img`.

The engine's files are read beside the modules of the same names: noising.js, tokenizer.js, clip.js, attention.js, unet.js,
vae.js, sampling.js, latent_diffusion.js. Below them are layers.js (convolution, norms), gemm.js with gemm.wat (the matrix
product, in WebAssembly) and safetensors.js; above them worker.js (the messages, explained at its top) and live.js, which
is what a page uses.
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
CHUNK = 3 << 20  # bytes of the weights in one string, a multiple of 3 so that base64 needs no padding in between


def write_model_script(model: Path, to: Path) -> None:
    """Write a minisd folder as one script, model.js, which a page can load where it may not fetch: from a file."""
    files = {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")}
    tokenizer = {name: (model / "tokenizer" / name).read_text("utf-8") for name in ("vocab.json", "merges.txt")}
    pad = model / "tokenizer" / "tokenizer_config.json"
    weights = files["model.safetensors"]
    content = {
        "config": json.loads(files["config.json"]),
        "tokenizer": {
            "vocab": json.loads(tokenizer["vocab.json"]),
            "merges": tokenizer["merges.txt"],
            "config": json.loads(pad.read_text("utf-8")) if pad.exists() else None,
        },
        "weights": [base64.b64encode(weights[i : i + CHUNK]).decode() for i in range(0, len(weights), CHUNK)],
    }
    to.write_text(f"globalThis.minisdModel = {json.dumps(content)};\n", "utf-8")


def write_page(model: Path, folder: Path) -> None:
    """Write a folder that draws with this model, opened as a file or served."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    for name in [*SCRIPTS, "index.html"]:
        shutil.copyfile(HERE / name, folder / name)
    write_model_script(model, folder / "model" / "model.js")
