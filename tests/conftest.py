"""What the tests share: reference numbers, random weights, a small whole model, and the libraries that are its oracles.

minisd and the oracles are imported inside the fixtures: minisd because pytest's jaxtyping hook has to be in place
before it, the oracles because each takes seconds.
"""

import json
import os
from pathlib import Path

# Where pytest runs a test on each core (`-n auto`), each of them computes with one thread. With more, they would wait
# for one another's cores. This is set before torch is imported, and the processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from chromium import find_chromium, launch
from safetensors.torch import load_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network

# With `-n auto`, all tests of such a module run in one process, because they share models that take long to train.
TOGETHER = ["test_coursework_swaps.py", "test_evaluation.py", "test_training.py", "test_training_conditions.py"]

FIXTURES = Path(__file__).parent / "fixtures"
CAPTIONS = [
    "a red fox, noto style",
    "a small blue circle above a large yellow star",
    "two green squares to the left of a heart",
    "the flag of Curaçao, twemoji style",
    "it's 10 o'clock: a smiling cat with naïve eyes",
    "a purple triangle at the top, a pink diamond at the bottom",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each process the next test when it is free, or a whole module if it is one of those above."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = nodeid.split("::")[0]
            return module if Path(module).name in TOGETHER else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def load_fixture():
    """load_fixture(name) -> the tensors of fixtures/name.safetensors ({} if there are none), and fixtures/name.json."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        tensors = FIXTURES / f"{name}.safetensors"
        info = json.loads((FIXTURES / f"{name}.json").read_text("utf-8"))
        return (load_file(tensors) if tensors.exists() else {}), info

    return load


@pytest.fixture(scope="session")
def randomise():
    """randomise(model, seed) fills every parameter and returns the model.

    Layers that start at zero or one are filled too: as long as they are what they start as, half of a network is
    switched off, and two that differ there agree.
    """

    @torch.no_grad()
    def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (parameter.numel() / len(parameter)) ** -0.5)
            else:
                parameter.copy_(0.2 * noise + (1 if name.endswith("weight") else 0))
        return model.eval()

    return fill


FORGET = """
%reset -f
import os, sys

os.chdir(r"{folder}")
if "matplotlib.pyplot" in sys.modules:
    sys.modules["matplotlib.pyplot"].close("all")
if "torch" in sys.modules:  # some notebooks turn gradients off
    sys.modules["torch"].set_grad_enabled(True)
del os, sys
"""


@pytest.fixture(scope="session")
def run_notebook():
    """run_notebook(notebook, folder, timeout) executes the cells of a notebook, in the folder where a reader opens it.

    One process runs all notebooks, one after the other, because to import torch and minisd takes seconds. The names,
    figures and settings of one are gone before the next begins. After an error, the next one gets a new process.
    """
    from jupyter_client.manager import KernelManager
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    kernels = []

    def run(notebook, folder: Path, timeout: int) -> None:
        if not kernels:
            kernels.append(KernelManager(kernel_name="python3"))
        try:
            for cells in (new_notebook(cells=[new_code_cell(FORGET.format(folder=folder))]), notebook):
                client = NotebookClient(cells, km=kernels[0], timeout=timeout, record_timing=False)
                client.execute()
                client.kc.stop_channels()
        except Exception:
            kernels.pop().shutdown_kernel(now=True)
            raise

    yield run
    for kernel in kernels:
        kernel.shutdown_kernel(now=True)


@pytest.fixture(scope="session")
def diffusers():
    import diffusers
    import diffusers.loaders.single_file_utils  # its own reader of CompVis checkpoints
    import diffusers.models.attention_processor

    return diffusers


@pytest.fixture(scope="session")
def transformers():
    import transformers

    return transformers


@pytest.fixture(scope="session")
def captions():
    return CAPTIONS


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 625 pieces, trained on six captions."""
    from minisd.tokenizer import BPETokenizer

    return BPETokenizer.train(CAPTIONS, vocab_size=640)


@pytest.fixture(scope="session")
def make_sd(randomise, tokenizer):
    """make_sd(**changes to the config) -> a LatentDiffusion of 32x32 pixels, 8x8 latents, with random weights."""
    from dataclasses import replace

    from minisd.clip import CLIPTextConfig
    from minisd.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
    from minisd.unet import UNetConfig
    from minisd.vae import AutoencoderConfig

    config = LatentDiffusionConfig(
        UNetConfig(model_channels=32, num_res_blocks=1, channel_mult=(1, 1), attention_resolutions=(2,), num_heads=2,
                   context_dim=32),
        AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1),
        CLIPTextConfig(vocab_size=640, max_length=16, width=32, layers=1, heads=2, projection_dim=32),
        image_size=32, scale_factor=0.5,
    )  # fmt: skip

    def make(**changes):
        return randomise(LatentDiffusion(replace(config, **changes), tokenizer), seed=7)

    return make


@pytest.fixture(scope="session")
def sd(make_sd):
    """That model, shared by all tests: don't change it."""
    return make_sd()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for the tests of pages. Where there is none, they are skipped."""
    api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[site]"')
    if find_chromium() is None:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        running = launch(playwright)
        yield running
        running.close()
