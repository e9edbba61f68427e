"""Stable Diffusion v1's own UNet in training, on one GPU: does the loss fall, how fast, how near to the card's limit?

    python -m benchmarks.scale --steps 200 --batch 32            both libraries, eager and compiled
    python -m benchmarks.scale --small --device cpu --steps 3    to see that it runs

Real latents: minisd's sample pictures at 256x256, through the autoencoder that ships (which makes one place of 4x4
pixels), are 64x64x4, as those of 512x512 pictures are in Stable Diffusion. The contexts come from the text tower that
ships, with zeros up to 77x768. Both libraries go through one loop: the noise, the loss, bf16 autocast, fused AdamW,
clipping, EMA.

MFU (Chowdhery et al. 2022, PaLM, appendix B) is the floating-point operations that the model's mathematics needs, per
second, over those of the card at its best: here, a large bf16 matrix product that is timed before the runs.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import minisd
from minisd import UNetConfig, UNetModel, epsilon_loss
from minisd.checkpoint.diffusers import unet_config_json
from minisd.data import sample
from minisd.training import EMA

SMALL = UNetConfig(model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2, 1), num_heads=4)


@dataclass
class Run:
    """What came of one training."""

    peer: str  # minisd or diffusers
    compiled: bool
    batch: int
    losses: list[float]  # mean over each tenth of the run
    images_per_s: float  # after the warm-up
    peak_gb: float  # memory of the GPU, weights, gradients, moments and EMA included
    tflops: float  # of the model's mathematics, a second
    mfu: float  # share of the card's measured peak


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each run; the first tenth is not timed")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--peers", nargs="+", choices=["minisd", "diffusers"], default=["minisd", "diffusers"])
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a small network and pictures of 32x32")
    parser.add_argument("--profile", action="store_true", help="show where the time of a step goes")
    parser.add_argument("--out", type=Path, help="write what was measured, as JSON")
    return parser.parse_args(argv)


def encoded(count: int, size: int, device: str, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Latents [count 4 size/4 size/4] and contexts [count 77 768] of sample pictures."""
    pictures, sd = sample(), minisd.load("emoji", device)
    latents = []
    with torch.no_grad():
        for indices in torch.arange(count).split(batch):
            x = F.interpolate(pictures.batch(indices).to(device), size=(size, size), mode="bilinear")
            latents.append(sd.get_first_stage_encoding(sd.encode_first_stage(x).mode()))
        contexts = sd.get_learned_conditioning(pictures.captions[:count])
    n, d = contexts.shape[1:]
    return torch.cat(latents), F.pad(contexts, (0, 768 - d, 0, 77 - n))


def build(peer: str, config: UNetConfig, device: str, recompute: bool) -> tuple[nn.Module, Callable]:
    """A fresh UNet, and how to ask it: predict(x, t, context)."""
    torch.manual_seed(0)
    if peer == "minisd":
        model = UNetModel(config)
        model.use_checkpoint(recompute)
        predict = model
    else:
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel.from_config(unet_config_json(config))
        if recompute:
            model.enable_gradient_checkpointing()

        def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return model(x, t, context, return_dict=False)[0]

    return model.to(device, memory_format=torch.channels_last).train(), predict


def flops_per_image(config: UNetConfig, z: Tensor, context: Tensor) -> int:
    """Of a step: forward, and twice as many backward (a gradient for the inputs, and one for the weights)."""
    with torch.device("meta"):
        model = UNetModel(config)
        x, c = torch.empty(1, *z.shape[1:]), torch.empty(1, *context.shape[1:])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, torch.zeros(1, dtype=torch.long), c)
    return 3 * counter.get_total_flops()


def peak_flops(device: str, n: int) -> float:
    """Operations a second of a bf16 product of n x n matrices, at its best."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start = clock(device)
        a @ b
        best = min(best, clock(device) - start)
    return 2 * n**3 / best


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(peer: str, compiled: bool, options: argparse.Namespace, z: Tensor, context: Tensor, peak: float) -> Run:
    """One run from random weights: the same pictures, noise and times for each peer."""
    device = options.device
    config = SMALL if options.small else UNetConfig()
    model, predict = build(peer, config, device, options.recompute)
    if compiled:
        model.compile()
    schedule = minisd.NoiseSchedule.scaled_linear(0.00085, 0.012, timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    ema = EMA(model, 0.9999)
    generator = torch.Generator(device).manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> Tensor:
        i = torch.randint(len(z), (options.batch,), generator=generator, device=device)
        t = torch.randint(1000, (options.batch,), generator=generator, device=device)
        noise = torch.randn(options.batch, *z.shape[1:], generator=generator, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = epsilon_loss(predict, schedule, z[i], context[i], t, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        return loss.detach()

    warm = max(1, options.steps // 10)
    losses = [step() for _ in range(warm)]
    start = clock(device)
    losses += [step() for _ in range(options.steps - warm)]
    images_per_s = (options.steps - warm) * options.batch / (clock(device) - start)
    if options.profile:
        with torch.profiler.profile() as profiler:
            step()
        print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25))
    tenths = [round(torch.stack(part).mean().item(), 4) for part in chunks(losses, 10)]
    achieved = images_per_s * flops_per_image(config, z, context)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return Run(peer, compiled, options.batch, tenths, images_per_s, peak_gb, achieved / 1e12, achieved / peak)


def chunks(items: list, count: int) -> list[list]:
    size = -(-len(items) // count)
    return [items[i : i + size] for i in range(0, len(items), size)]


def main(argv: list[str] | None = None) -> list[Run]:
    options = arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # what autocast leaves in float32
    z, context = encoded(*((64, 32) if options.small else (1280, 256)), options.device)
    peak = peak_flops(options.device, 512 if options.small else 8192)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}: {peak / 1e12:.1f} TFLOP/s in bf16; torch {torch.__version__}; latents {list(z.shape)}\n")
    print("| what | batch | loss, first and last tenth | images/s | peak GB | TFLOP/s | MFU |")
    print("|---|---|---|---|---|---|---|")
    runs = []
    for compiled in options.compile:
        for peer in options.peers:
            run = train(peer, compiled == "yes", options, z, context, peak)
            runs.append(run)
            what = f"{run.peer}, {'compiled' if run.compiled else 'eager'}"
            print(
                f"| {what} | {run.batch} | {run.losses[0]:.3f}, {run.losses[-1]:.3f} | {run.images_per_s:.1f} "
                f"| {run.peak_gb:.1f} | {run.tflops:.1f} | {run.mfu:.1%} |",
                flush=True,
            )
            if options.device == "cuda":
                torch._dynamo.reset()
                torch.cuda.empty_cache()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"device": name, "peak_tflops": peak / 1e12, "runs": [asdict(run) for run in runs]}
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return runs


if __name__ == "__main__":
    main()
