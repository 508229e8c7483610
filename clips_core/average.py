"""An exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn


class Average:
    """Averaged copies of the parameters that train: a ← decay · a + (1 − decay) · weight after every step.

    Under FSDP each process averages its own shards.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in model.named_parameters():
            if name in self.tensors:
                self.tensors[name].lerp_(value.detach(), 1 - self.decay)
