"""A small model with everything that makes sharding awkward, and the same loss as a pure function of its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, CLASSES = 5, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))  # one element: empty shards on every rank but one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    """Uneven, one-element, tied, frozen and unused parameters, and a head without a reference."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.tied(self.frozen(x))))


def make_toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def pure_loss(w: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The same computation, on named tensors (``w`` holds the trained ones and the frozen ones)."""
    x, y = batch
    x = x @ w["embed.weight"].T
    for i in range(2):
        name = f"blocks.{i}"
        inner = torch.tanh(x @ w[f"{name}.up.weight"].T + w[f"{name}.up.bias"])
        x = x + w[f"{name}.gain"] * (inner @ w[f"{name}.down.weight"].T + w[f"{name}.down.bias"])
    x = x @ w["frozen.weight"].T + w["frozen.bias"]
    x = torch.tanh(x @ w["embed.weight"].T)
    return F.cross_entropy(x @ w["head.weight"].T + w["head.bias"], y)


def make_batches(steps: int, samples: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labels change their meaning every few steps, so that gradients turn and ω moves off 0."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(steps):
        x = torch.randn(samples, WIDTH, generator=generator)
        y = (x[:, (step // 4) % WIDTH] > 0).long() + (x[:, (step // 3 + 2) % WIDTH] > 0.5).long()
        batches.append((x, y))
    return batches


def make_theta0(model: Toy, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Pre-trained weights a little away from the initial ones; the head has none."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: (p.detach() + 0.02 * torch.randn(p.shape, generator=generator)).to(dtype)
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("head")
    }
