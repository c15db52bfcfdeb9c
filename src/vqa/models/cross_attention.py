"""Fusion by cross-attention: a question's tokens look at the image's tokens."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from vqa.config.runs import CrossAttentionConfig
from vqa.data.batches import Batch
from vqa.models.layers import Features, feed_forward, join_heads, split_heads


class CrossAttentionFusion(nn.Module):
    """Layers in which a question's tokens attend to each other, then to the image's tokens.

    The pairs of one image stand in one row of queries, so its keys and values are projected once
    and read in place: nothing of the image is copied per pair. Up to the first look at an image a
    question is worked on once, however many images it is asked about. Pre-norm transformer layers
    as in https://arxiv.org/abs/2002.04745; the mean of the question's tokens goes through one more
    hidden layer. With `queries` "summary" the text tower's summary asks alone, one query a pair in
    place of T.
    """

    def __init__(self, config: CrossAttentionConfig, image_width: int, text_width: int):
        super().__init__()
        self.image_in = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, config.width))
        self.text_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, config.width))
        self.layers = nn.ModuleList(CrossAttentionLayer(config.width, config.heads) for _ in range(config.layers))
        self.width, self.queries = 2 * config.width, config.queries
        self.rest = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, self.width), nn.GELU())

    def forward(
        self, image: Features, text: Features, attention_mask: Tensor, image_index: Tensor, question_index: Tensor
    ) -> Tensor:
        """One vector per pair, (N, 2 D)."""
        asking, mask = self._asking(text, attention_mask)
        asked, memory, rows = self._up_to_last_look(image, asking, mask, image_index, question_index)
        return self.rest(self.layers[-1].summary(asked, memory, rows, mask[question_index]))  # (N, 2 D)

    @torch.no_grad()
    def look(self, image: Features, text: Features, batch: Batch) -> Tensor:
        """Where the last layer looks: (N, heads, T, P), each token's weights over the image summing to one."""
        asking, mask = self._asking(text, batch.attention_mask)
        asked, memory, rows = self._up_to_last_look(image, asking, mask, batch.image_index, batch.question_index)
        return self.layers[-1].attention(asked.query, memory, rows)

    def _asking(self, text: Features, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What of the questions meets the images, (U, T, D), and which of it is not padding, (U, T) bool."""
        if self.queries == "summary":
            return text.pooled[:, None], attention_mask[:, :1].bool()  # the first token is never padding
        return text.tokens, attention_mask.bool()

    def _up_to_last_look(
        self, image: Features, asking: Tensor, mask: Tensor, image_index: Tensor, question_index: Tensor
    ) -> tuple["Asked", Tensor, "Rows"]:
        """What the last layer's look at the image is given: what is asked of it, its memory (I, P, D), rows."""
        memory = self.image_in(image.tokens)
        rows = pair_rows(image_index, len(memory))
        once = self.layers[0].ask(self.text_in(asking), mask)  # (U, T, D) each
        asked = Asked(*(each[question_index] for each in once))
        for layer, following in pairwise(self.layers):
            asked = following.ask(layer(asked, memory, rows), mask[question_index])
        return asked, memory, rows


class Asked(NamedTuple):
    """A question on its way to an image, (…, T, D) each."""

    tokens: Tensor
    query: Tensor  # where to look
    gate: Tensor  # which of what is seen there matters


class PairRows(NamedTuple):
    """Where each pair stands when the pairs of one image make up one row, padded to the longest: Q pairs."""

    image: Tensor  # (N,)
    place: Tensor  # (N,) 0 … Q - 1
    shape: tuple[int, int]  # (I, Q)

    @classmethod
    def of(cls, image_index: Tensor, images: int) -> "PairRows":
        counts = torch.bincount(image_index, minlength=images)
        order = image_index.argsort(stable=True)
        within = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[image_index[order]]
        place = torch.empty_like(within).scatter_(0, order, within)
        return cls(image_index, place, (images, int(counts.max())))

    def gather(self, pairs: Tensor) -> Tensor:
        """(N, …) -> (I, Q, …), zeros where an image has fewer than Q pairs."""
        return pairs.new_zeros(*self.shape, *pairs.shape[1:]).index_put((self.image, self.place), pairs)

    def scatter(self, rows: Tensor) -> Tensor:
        """(I, Q, …) -> (N, …)."""
        return rows[self.image, self.place]

    def keep(self, of_images: Tensor) -> Tensor:
        """What belongs to each row's image, (I, …): the rows are the images."""
        return of_images


class LonePairs(NamedTuple):
    """As PairRows, with each pair in a row of its own, so that no shape depends on the data: for an ONNX graph."""

    image: Tensor  # (N,)

    def gather(self, pairs: Tensor) -> Tensor:
        return pairs[:, None]

    def scatter(self, rows: Tensor) -> Tensor:
        return rows[:, 0]

    def keep(self, of_images: Tensor) -> Tensor:
        return of_images[self.image]


Rows = PairRows | LonePairs


def pair_rows(image_index: Tensor, images: int) -> Rows:
    return LonePairs(image_index) if torch.onnx.is_in_onnx_export() else PairRows.of(image_index, images)


class CrossAttentionLayer(nn.Module):
    """Question to question, question to image, feed-forward; each on top of what came in.

    What a token sees is multiplied by a gate that the token sets, the product by which questions and images meet in
    https://arxiv.org/abs/1610.04325: "is it red?" compares what was asked with what is there, and attention by itself
    only adds the one to the other.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_qkv, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.gate, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.feed_forward = feed_forward(width)

    def ask(self, tokens: Tensor, mask: Tensor) -> Asked:
        """`tokens` (B, T, D) after each has attended to the others of its question, and what they ask of an image."""
        query, key, value = (split_heads(x, self.heads) for x in self.self_qkv(self.self_norm(tokens)).chunk(3, -1))
        within = attend(query, key, value, attn_mask=mask[:, None, None, :])  # (B, heads, T, D / heads)
        tokens = tokens + self.self_out(join_heads(within))
        normed = self.cross_norm(tokens)
        return Asked(tokens, self.cross_q(normed), self.gate(normed))

    def forward(self, asked: Asked, memory: Tensor, rows: Rows) -> Tensor:
        """The tokens (N, T, D) after a look at their images' `memory` (I, P, D), and the feed-forward."""
        tokens = self._seeing(asked, memory, rows)
        return tokens + self.feed_forward(tokens)

    def summary(self, asked: Asked, memory: Tensor, rows: Rows, mask: Tensor) -> Tensor:
        """The mean (N, D) of `forward` over the tokens in `mask` (N, T).

        The feed-forward's last step is linear, so it is taken of the mean: once a pair, not once a token.
        """
        tokens = self._seeing(asked, memory, rows)
        weights = (mask / mask.sum(1, keepdim=True)).to(tokens.dtype)[:, None, :]  # (N, 1, T)
        hidden = self.feed_forward[:-1](tokens)
        return (weights @ tokens + self.feed_forward[-1](weights @ hidden)).squeeze(1)

    def attention(self, query: Tensor, memory: Tensor, rows: Rows) -> Tensor:
        """Where each token of a question looks, (N, heads, T, P), rows summing to one: for looking at, not training."""
        query = split_heads(query, self.heads)
        key = split_heads(self.cross_kv(memory).chunk(2, -1)[0], self.heads)[rows.image]
        return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)

    def _seeing(self, asked: Asked, memory: Tensor, rows: Rows) -> Tensor:
        query = rows.gather(asked.query).flatten(1, 2)  # (I, Q T, D)
        key, value = rows.keep(self.cross_kv(memory)).chunk(2, -1)  # (I, P, D), once per image
        seen = attend(*(split_heads(x, self.heads) for x in (query, key, value)))  # (I, heads, Q T, D / heads)
        seen = rows.scatter(join_heads(seen).unflatten(1, (-1, asked.tokens.shape[1])))  # (N, T, D)
        return asked.tokens + self.cross_out(asked.gate * seen)
