"""The engine: what a training loop needs to know of the machine that it runs on.

`SingleDevice` offers the handful of methods of `accelerate.Accelerator` that the loops call. Hand in an
`Accelerator` itself, and the same loop runs on many devices.
"""

import contextlib

import torch
from torch import Tensor, nn

from ..checkpoint import best_device


class SingleDevice:
    """One device, one process.

    Args:
        device: "cuda", "mps", "cpu"; None takes the best that is there.
        mixed_precision: "bf16" computes convolutions and matrix products in bfloat16, "no" all in float32.
    """

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self, device: str | torch.device | None = None, mixed_precision: str = "no"):
        if mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision is 'no' or 'bf16', not {mixed_precision!r}")
        self.device = torch.device(device or best_device())
        self.mixed_precision = mixed_precision

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device (an Accelerator would also wrap it for many processes)."""
        return model.to(self.device)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The model without what `prepare` put around it."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the loss is computed."""
        if self.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def clip_grad_norm_(self, parameters, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most `max_norm`; returns the norm that they had."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor: Tensor, reduction: str = "mean") -> Tensor:
        """The mean over all processes: there is one."""
        return tensor
