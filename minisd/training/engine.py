"""The engine: what a training loop needs to know about the machine that it runs on.

`SingleDevice` has the few methods of `accelerate.Accelerator` that the loops call. An `Accelerator` fits into the same
place, and then the same loop runs on many devices, data parallel: each process holds the whole model and takes a share
of every batch, and the gradients are averaged (DDP). `make_engine` gives whichever is right.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint import best_device

Engine = Any  # a SingleDevice or an accelerate.Accelerator, which is not imported before somebody asks for it


def make_engine(device: str | torch.device | None = None, mixed_precision: str = "no") -> Engine:
    """A `SingleDevice`; or an `Accelerator` if torchrun or `accelerate launch` started several processes.

    Args:
        device: "cuda", "mps", "cpu"; None takes the best that is there.
        mixed_precision: "bf16" or "no", as in `SingleDevice`.

    Raises:
        ImportError: there are several processes, but no Accelerate. ValueError: they can't be joined to one run.
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
    wanted = torch.device(device or best_device()).type
    # Without cpu=True, Accelerate would not join processes on CPUs, and each would train a copy of its own.
    engine = Accelerator(cpu=wanted == "cpu", mixed_precision=mixed_precision)
    kind = getattr(engine.distributed_type, "value", str(engine.distributed_type))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        kind = "FSDP"  # on CPUs, Accelerate passes over it
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
    """How many processes the launcher says that it started; 1 without a launcher."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name) or 1) for name in names)


class SingleDevice:
    """One device, one process.

    Args:
        device: "cuda", "mps", "cpu"; None takes the best that is there.
        mixed_precision: "bf16" computes convolutions and matrix products in bfloat16, "no" all in float32.

    Raises ValueError where a launcher started several processes: each would train a copy, all into the same files.
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
        self.device = torch.device(device or best_device())
        self.mixed_precision = mixed_precision

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device. (An Accelerator also wraps it, so that gradients are averaged.)"""
        return model.to(self.device), optimizer

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The model without what `prepare` put around it."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the loss is computed."""
        if self.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """The context in which gradients are added up on this process, and not averaged over all of them yet."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def clip_grad_norm_(self, parameters, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most `max_norm`; returns the norm that they had."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, one after the other: there is one."""
        return tensor

    def wait_for_everyone(self) -> None:
        """All processes meet here."""


def encode_shared(encode: Callable[[Tensor], Tensor], n: int, batch_size: int, engine: Engine) -> Tensor:
    """`encode(indices)` of n samples in batches, on the CPU: each process encodes its share, and each gets all rows.

    The batches are the same as those of one process, and so are the rows, to the last bit.
    """
    batches, encoded = torch.arange(n).split(batch_size), []
    for first in range(0, len(batches), engine.num_processes):
        # In each round a process takes one batch. In the last round some have none left and encode the last one again.
        mine = batches[min(first + engine.process_index, len(batches) - 1)]
        rows = encode(mine)
        # `gather` wants as many rows from each process, so the shorter last batch is filled up with zeros.
        filled = torch.cat([rows, rows.new_zeros(batch_size - len(rows), *rows.shape[1:])])
        encoded.append(engine.gather(filled).cpu())
    return torch.cat(encoded)[:n]


def gather_with_grad(x: Tensor) -> Tensor:
    """The rows of all processes, one after the other. Gradients flow back to the process that the rows came from."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    # The loss of every process depends on all rows. So on the way back, the gradients that all processes have for the
    # rows of this one are summed, and `contrastive_loss` needs no word about processes.
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))
