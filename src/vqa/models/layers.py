"""The four towers: ViT and ResNet18 read an image, BERT and DistilBERT read a question.

All are the library's own classes, built from a config (random weights) or from public weights: a
local folder, a hub id at a pinned revision, or torchvision's ResNet18. Image towers take uint8
pixels and normalise them as their weights expect, so a tower cannot get another one's statistics.
"""

from typing import NamedTuple

import torch
from torch import nn


class Features(NamedTuple):
    """What a tower says of each of its inputs (B of them): P tokens and one summary, D wide."""

    tokens: torch.Tensor  # (B, P, D)
    pooled: torch.Tensor  # (B, D)


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, D) -> (B, heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, L, D / heads) -> (B, L, D)."""
    return x.transpose(1, 2).flatten(2)
