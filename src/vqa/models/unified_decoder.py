"""The unified embedding-decoder: image patches join the question's tokens, the answer is written out.

    [ image tokens | question tokens ]  [ BOS answer tokens ]
      prefix, seen both ways              each sees the prefix and what stands before it

A prefix language model (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.2.1) over
projected image features, as in https://arxiv.org/abs/2407.07726.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import PreTrainedTokenizerBase

from vqa.config import ModelConfig
from vqa.data.batches import UNKNOWN_ANSWER, Batch
from vqa.models.image_towers import image_encoder
from vqa.models.layers import feed_forward, join_heads, split_heads
from vqa.models.vqa_model import AlignmentModel, VQAModel

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # a layer's keys and values, (B, heads, L, D / heads) each


class DecoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, with what came before given as a cache."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = feed_forward(width)

    def forward(
        self, tokens: torch.Tensor, visible: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """`tokens` (B, L, D) after `past`; `visible` (B, 1, L, past + L) says who sees whom."""
        query, key, value = self._projected(tokens)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        tokens = tokens + self.out(join_heads(attend(query, key, value, attn_mask=visible)))
        return tokens + self.feed_forward(tokens), (key, value)

    def keys_and_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All that later tokens see of `tokens` (B, L, D) in this layer."""
        return self._projected(tokens)[1:]

    def _projected(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(split_heads(x, self.heads) for x in self.qkv(self.norm(tokens)).chunk(3, -1))


class UnifiedDecoderModel(VQAModel):
    """Answers by writing: the same interface as VQAModel, with a decoder for text tower, fusion and head.

    `forward` scores the closed answer list, log p(answer | image, question); `generate` writes
    freely. Both continue one cached prefix. An answer is its tokens and [SEP].
    """

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, answers: list[str], image_size: int):
        nn.Module.__init__(self)
        self.config, self.tokenizer, self.answers, self.image_size = config, tokenizer, answers, image_size
        width = config.fusion.width
        self.image_encoder = image_encoder(config.image_encoder, image_size, config.dropout)
        self.project = nn.Sequential(nn.LayerNorm(self.image_encoder.width), nn.Linear(self.image_encoder.width, width))
        self.embed = nn.Embedding(len(tokenizer), width)
        self.position = nn.Embedding(config.max_question_tokens + 16, width)  # question, then answer
        self.layers = nn.ModuleList(DecoderLayer(width, config.fusion.heads) for _ in range(config.fusion.layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)  # as BERT's
        written = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        longest = max(map(len, written), default=0) + 1
        padded = [[*ids, tokenizer.sep_token_id, *[-1] * (longest - 1 - len(ids))] for ids in written]
        self.register_buffer("answer_ids", torch.tensor(padded).view(len(answers), longest), persistent=False)  # (A, L)

    def forward(
        self,
        pixel_values: torch.Tensor,  # (I, 3, H, W) uint8
        image_index: torch.Tensor,  # (N,)
        input_ids: torch.Tensor,  # (U, T)
        attention_mask: torch.Tensor,  # (U, T)
        question_index: torch.Tensor,  # (N,)
        labels: torch.Tensor | None = None,  # (N,)
    ) -> torch.Tensor:
        """Scores (N, A) of every answer; with `labels`, only -log p (N,) of each one's own answer."""
        cache, seen = self.prefix(pixel_values, image_index, input_ids, attention_mask, question_index)
        if labels is not None:
            known = labels != UNKNOWN_ANSWER
            return -self.log_likelihood(self.answer_ids[labels.clamp(min=0)], cache, seen) * known
        each = [self.log_likelihood(ids.expand(len(image_index), -1), cache, seen) for ids in self.answer_ids]
        return torch.stack(each, 1)

    def loss(self, network: nn.Module, batch: Batch, pairs: int) -> torch.Tensor:
        """Next-token loss on the answers, summed over this batch, as a share of `pairs`."""
        return network(**batch.inputs(), labels=batch.labels).sum() / pairs

    def prefix(
        self,
        pixel_values: torch.Tensor,
        image_index: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        question_index: torch.Tensor,
    ) -> tuple[Cache, torch.Tensor]:
        """Keys and values of image and question for each pair, and which of them are not padding (N, P + T).

        The last layer stops there: nothing is read off the prefix itself.
        """
        image = self.project(self.image_encoder(pixel_values).tokens)  # (I, P, D)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        question = self.embed(input_ids) + self.position(places)  # (U, T, D)
        tokens = torch.cat([image[image_index], question[question_index]], 1)  # (N, P + T, D)
        seen = torch.cat([attention_mask.new_ones(image.shape[:2])[image_index], attention_mask[question_index]], 1)
        visible = seen.bool()[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        cache = []
        for layer in self.layers[:-1]:
            tokens, kept = layer(tokens, visible)
            cache.append(kept)
        return [*cache, self.layers[-1].keys_and_values(tokens)], seen.bool()

    def log_likelihood(self, ids: torch.Tensor, cache: Cache, seen: torch.Tensor) -> torch.Tensor:
        """log p (N,) of the token rows `ids` (N, L), ended by -1 where shorter, after the cached prefix."""
        inputs = torch.cat([ids.new_full((len(ids), 1), self.tokenizer.cls_token_id), ids[:, :-1].clamp(min=0)], 1)
        logits, _ = self.decode(inputs, cache, seen)  # (N, L, V)
        return (
            -cross_entropy(logits.float().flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="none")
            .view(ids.shape)
            .sum(1)
        )

    def decode(self, ids: torch.Tensor, cache: Cache, seen: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """Logits (N, L, V) of the token after each of `ids` (N, L), which follow what `cache` holds.

        `seen` (N, P + T) masks the prefix; tokens already decoded are visible to all that follow.
        """
        length, before = ids.shape[1], cache[0][0].shape[2] - seen.shape[1]
        places = self.config.max_question_tokens + before + torch.arange(length, device=ids.device)
        tokens = self.embed(ids) + self.position(places)
        causal = torch.ones(length, before + length, dtype=torch.bool, device=ids.device).tril(before)
        visible = torch.cat([seen[:, None, :].expand(-1, length, -1), causal.expand(len(ids), -1, -1)], 2)[
            :, None
        ]  # (N, 1, L, P + T + before + L)
        longer = []
        for layer, past in zip(self.layers, cache, strict=True):
            tokens, kept = layer(tokens, visible, past)
            longer.append(kept)
        return self.norm(tokens) @ self.embed.weight.T, longer  # the embedding is the output layer too

    @torch.inference_mode()
    def generate(self, batch: Batch, max_tokens: int = 8) -> list[str]:
        """The answer to each pair, written greedily, one token a step, each step reusing the last one's cache."""
        cache, seen = self.prefix(**batch.inputs())
        last = torch.full((len(seen), 1), self.tokenizer.cls_token_id, device=seen.device)
        written, stop = [], self.tokenizer.sep_token_id
        ended = torch.zeros_like(last, dtype=torch.bool)
        while len(written) < max_tokens and not ended.all():
            logits, cache = self.decode(last, cache, seen)
            last = logits.argmax(-1)
            ended |= last == stop
            written.append(last)
        rows = torch.cat(written, 1).tolist()
        return [self.tokenizer.decode(row[: row.index(stop)] if stop in row else row) for row in rows]

    def take_towers(self, folder: Path) -> None:
        """Start from the image tower of an AlignmentModel saved in `folder`."""
        towers = AlignmentModel.from_pretrained(folder)
        self.image_encoder.load_state_dict(towers.image_encoder.state_dict())

    def checkpoint_gradients(self) -> None:
        """The image tower's only: a cache cannot be thrown away and computed again by layers."""
        self.image_encoder.checkpoint_gradients()
