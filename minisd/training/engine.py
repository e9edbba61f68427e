"""The engine: what a training loop needs to know about the machine that it runs on.

`SingleDevice` has the few methods of `accelerate.Accelerator` that the loops call. With an `Accelerator` in its place,
the same loop runs on several devices in parallel (distributed data parallel, DDP): each process holds the whole model
and computes a part of every batch, and the gradients are averaged. `make_engine` chooses between the two.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint import find_device

Engine = Any  # a SingleDevice or an accelerate.Accelerator, which is only imported where it is used


def make_engine(device: str | torch.device | None = None, mixed_precision: str = "no") -> Engine:
    """A `SingleDevice`; or an `Accelerator` if torchrun or `accelerate launch` started several processes.

    Args:
        device: "cuda", "mps" or "cpu". None takes the fastest that is available.
        mixed_precision: "bf16" or "no", as in `SingleDevice`.

    Raises:
        ImportError: there are several processes, but Accelerate is not installed.
        ValueError: the processes cannot be joined to one run.
    """
    started = processes_started()
    if started == 1:
        return SingleDevice(device, mixed_precision)
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            f'{started} processes were started, and to train with several takes Accelerate: pip install "minisd[train]"'
        ) from error
    wanted = torch.device(device).type if device else find_device().type
    # Without cpu=True, Accelerate would not connect processes on CPUs, and each would train its own copy of the model.
    engine = Accelerator(cpu=wanted == "cpu", mixed_precision=mixed_precision)
    kind = getattr(engine.distributed_type, "value", str(engine.distributed_type))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        kind = "FSDP"  # on CPUs, Accelerate ignores this setting without a warning
    if engine.num_processes != started:
        problem = f"Accelerate joined {engine.num_processes} of {started} processes: start them by torchrun"
    elif engine.device.type != wanted:
        problem = f"the run was asked to be on {wanted}, and Accelerate chose {engine.device.type}"
    elif kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        problem = f"{kind} is not supported: use DDP (multi_gpu), where each process holds the whole model"
    elif engine.gradient_accumulation_steps != 1:
        problem = f"give --accumulate {engine.gradient_accumulation_steps} to minisd, not to accelerate"
    else:
        return engine
    raise ValueError(problem)


def processes_started() -> int:
    """How many processes the launcher started, by its environment variables; 1 without a launcher."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name) or 1) for name in names)


class SingleDevice:
    """One device, one process.

    Args:
        device: "cuda", "mps" or "cpu". None takes the fastest that is available.
        mixed_precision: "bf16" computes convolutions and matrix products in bfloat16, "no" everything in float32.

    Raises ValueError if a launcher started several processes: each would train its own copy of the model, and all would
    write to the same files.
    """

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self, device: str | torch.device | None = None, mixed_precision: str = "no"):
        if mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision is 'no' or 'bf16', not {mixed_precision!r}")
        if processes_started() > 1:
            raise ValueError(
                f"this is one of {processes_started()} processes, and a SingleDevice knows only itself: "
                "use make_engine(), which joins them"
            )
        self.device = find_device(device)
        self.mixed_precision = mixed_precision

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device. (An Accelerator also wraps it, so that gradients are averaged.)"""
        return model.to(self.device)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The model without the wrapper of `prepare`."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context for forward passes: with "bf16", PyTorch's autocast."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """The context in which gradients are accumulated on this process, but not yet averaged over all processes."""
        return contextlib.nullcontext()

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, concatenated. There is only one process here."""
        return tensor

    def wait_for_everyone(self) -> None:
        """Wait until all processes have reached this call (a barrier)."""


def encode_shared(encode: Callable[[Tensor], Tensor], n: int, batch_size: int, engine: Engine) -> Tensor:
    """`encode(indices)` for n samples in batches. Each process encodes a share, and all get all rows, on the CPU.

    The batches are the same as with a single process, so the result is the same to the last bit.
    """
    batches, encoded = torch.arange(n).split(batch_size), []
    for first in range(0, len(batches), engine.num_processes):
        # In each round every process takes one batch. If there are too few batches in the last round, the processes
        # without one encode the last batch again, because all have to take part in `gather`.
        mine = batches[min(first + engine.process_index, len(batches) - 1)]
        rows = encode(mine)
        # `gather` needs the same number of rows from each process, so a shorter last batch is padded with zeros.
        filled = torch.cat([rows, rows.new_zeros(batch_size - len(rows), *rows.shape[1:])])
        encoded.append(engine.gather(filled).cpu())
    return torch.cat(encoded)[:n]


def gather_with_grad(x: Tensor) -> Tensor:
    """The rows of all processes, concatenated. Gradients flow back to the process that a row came from."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    # Every process computes the loss from all rows. In the backward pass, `all_gather` sums the gradients that all
    # processes have for the rows of this one, and DDP then averages over the processes. The result is the gradient of
    # one loss over the whole batch, so `contrastive_loss` does not have to know about processes.
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))
