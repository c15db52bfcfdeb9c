"""Small pieces that several models share."""

from typing import NamedTuple

from torch import Tensor, nn


class Features(NamedTuple):
    """What a tower says of each of its inputs (B of them): P tokens and one summary, D wide."""

    tokens: Tensor  # (B, P, D)
    pooled: Tensor  # (B, D)


def feed_forward(width: int) -> nn.Sequential:
    """A transformer layer's norm and perceptron, (…, D) -> (…, D)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D / heads) -> (B, L, D)."""
    return x.transpose(1, 2).flatten(2)
