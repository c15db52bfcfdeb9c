"""The unified embedding-decoder: image patches join the question's tokens, the answer is written out.

    [ image tokens | question tokens ]  [ BOS answer tokens ]
      prefix, seen both ways              each sees the prefix and what stands before it

A prefix language model (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.2.1) over
projected image features, as in https://arxiv.org/abs/2407.07726.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as attend

from vqa.config import ModelConfig
from vqa.data.batches import UNKNOWN_ANSWER, Batch
from vqa.data.processor import Processor
from vqa.models.layers import feed_forward, join_heads, split_heads
from vqa.models.parts import IMAGE_TOWERS
from vqa.models.vqa_model import AlignmentModel, SavedModel, VQAOutput

Cache = list[tuple[Tensor, Tensor]]  # a layer's keys and values, (B, heads, L, D / heads) each


class DecoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, with what came before given as a cache."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = feed_forward(width)

    def forward(
        self, tokens: Tensor, visible: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`tokens` (B, L, D) after `past`; `visible` (B, 1, L, past + L) says who sees whom."""
        query, key, value = self._projected(tokens)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        tokens = tokens + self.out(join_heads(attend(query, key, value, attn_mask=visible)))
        return tokens + self.feed_forward(tokens), (key, value)

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All that later tokens see of `tokens` (B, L, D) in this layer."""
        return self._projected(tokens)[1:]

    def _projected(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(split_heads(x, self.heads) for x in self.qkv(self.norm(tokens)).chunk(3, -1))


class UnifiedDecoderModel(SavedModel):
    """Answers by writing: VQAModel's interface, with a decoder for text tower, fusion and head.

    `forward` scores the closed answer list, log p(answer | image, question); `generate` writes
    freely. Both continue one cached prefix. An answer is its tokens and [SEP].
    """

    def __init__(self, config: ModelConfig, processor: Processor, library: dict[str, dict] | None = None):
        super().__init__(config, processor)
        width, image, own = config.fusion.width, config.image_encoder, (library or {}).get("image_encoder")
        self.image_encoder = IMAGE_TOWERS[image.kind](image, processor.image_size, config.dropout, own)
        self.project = nn.Sequential(nn.LayerNorm(self.image_encoder.width), nn.Linear(self.image_encoder.width, width))
        self.embed = nn.Embedding(processor.vocabulary_size, width)
        self.position = nn.Embedding(config.max_question_tokens + 16, width)  # question, then answer
        self.layers = nn.ModuleList(DecoderLayer(width, config.fusion.heads) for _ in range(config.fusion.layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)  # as BERT's
        tokenizer = processor.tokenizer
        self.start, self.stop = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        written = [tokenizer.encode(answer, add_special_tokens=False).ids for answer in processor.answers]
        longest = max(map(len, written), default=0) + 1
        padded = [[*ids, self.stop, *[-1] * (longest - 1 - len(ids))] for ids in written]
        self.register_buffer("answer_ids", torch.tensor(padded).view(len(padded), longest), persistent=False)  # (A, L)

    def forward(
        self,
        pixel_values: Tensor,  # (I, 3, H, W) uint8
        image_index: Tensor,  # (N,)
        input_ids: Tensor,  # (U, T)
        attention_mask: Tensor,  # (U, T)
        question_index: Tensor,  # (N,)
        labels: Tensor | None = None,  # (N,)
        num_items_in_batch: int | None = None,
    ) -> VQAOutput:
        """Scores (N, A) of every answer; with `labels` the loss alone, as each answer costs a pass of the decoder.

        The loss is -log p of each pair's own answer, next token by next token, divided as VQAModel's.
        """
        cache, seen = self.prefix(pixel_values, image_index, input_ids, attention_mask, question_index)
        if labels is not None:
            known = labels != UNKNOWN_ANSWER
            costs = -self.log_likelihood(self.answer_ids[labels.clamp(min=0)], cache, seen) * known  # (N,)
            return VQAOutput(costs.sum() / (num_items_in_batch or len(labels)), None)
        each = [self.log_likelihood(ids.expand(len(image_index), -1), cache, seen) for ids in self.answer_ids]
        return VQAOutput(None, torch.stack(each, 1))

    def prefix(
        self,
        pixel_values: Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        question_index: Tensor,
    ) -> tuple[Cache, Tensor]:
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
            tokens, entry = layer(tokens, visible)
            cache.append(entry)
        return [*cache, self.layers[-1].keys_and_values(tokens)], seen.bool()

    def log_likelihood(self, ids: Tensor, cache: Cache, seen: Tensor) -> Tensor:
        """log p (N,) of the token rows `ids` (N, L), ended by -1 where shorter, after the cached prefix."""
        inputs = torch.cat([ids.new_full((len(ids), 1), self.start), ids[:, :-1].clamp(min=0)], 1)
        logits, _ = self.decode(inputs, cache, seen)  # (N, L, V)
        costs = cross_entropy(logits.float().flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="none")
        return -costs.view(ids.shape).sum(1)

    def decode(self, ids: Tensor, cache: Cache, seen: Tensor) -> tuple[Tensor, Cache]:
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
            tokens, entry = layer(tokens, visible, past)
            longer.append(entry)
        return self.norm(tokens) @ self.embed.weight.T, longer  # the embedding is the output layer too

    @torch.inference_mode()
    def generate(self, batch: Batch, max_tokens: int = 8) -> list[str]:
        """The answer to each pair, written greedily, one token a step, each step reusing the last one's cache."""
        cache, seen = self.prefix(**batch.inputs())
        last = torch.full((len(seen), 1), self.start, device=seen.device)
        written, ended = [], torch.zeros_like(last, dtype=torch.bool)
        while len(written) < max_tokens and not ended.all():
            logits, cache = self.decode(last, cache, seen)
            last = logits.argmax(-1)
            ended |= last == self.stop
            written.append(last)
        rows = torch.cat(written, 1).tolist()
        answers = [row[: row.index(self.stop)] if self.stop in row else row for row in rows]
        return self.processor.tokenizer.decode_batch(answers, skip_special_tokens=False)

    def load_towers(self, folder: Path) -> None:
        """Start from the image tower of an AlignmentModel saved in `folder`."""
        towers = AlignmentModel.from_pretrained(folder)
        self.image_encoder.load_state_dict(towers.image_encoder.state_dict())

    def checkpoint_gradients(self) -> None:
        """The image tower's only: a cache cannot be thrown away and computed again by layers."""
        self.image_encoder.checkpoint_gradients()
