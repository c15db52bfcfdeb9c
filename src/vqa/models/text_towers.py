"""The four towers: ViT and ResNet18 read an image, BERT and DistilBERT read a question.

All are the library's own classes, built from a config (random weights) or from public weights: a
local folder, a hub id at a pinned revision, or torchvision's ResNet18. Image towers take uint8
pixels and normalise them as their weights expect, so a tower cannot get another one's statistics.
"""

import torch
import transformers
from torch import nn

from vqa.config import TextEncoderConfig
from vqa.models.layers import Features
from vqa.models.pretrained import _build, _checkpoint_layers

BERT_TO_DISTILBERT = {  # the library's names for the parts of one layer
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


class BertEncoder(nn.Module):
    """BERT, https://arxiv.org/abs/1810.04805; summary: the mean of the question's tokens."""

    def __init__(self, config: TextEncoderConfig, vocabulary: int, dropout: float):
        super().__init__()
        shape = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.text = _build(transformers.BertModel, shape, config, add_pooling_layer=False)
        self.width = config.width

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Features:
        tokens = self.text(input_ids, attention_mask=attention_mask).last_hidden_state  # (U, T, D)
        weights = attention_mask / attention_mask.sum(1, keepdim=True)  # (U, T), padding weighs nothing
        return Features(tokens, (weights.to(tokens.dtype)[:, None, :] @ tokens).squeeze(1))

    def checkpoint_gradients(self) -> None:
        _checkpoint_layers(self.text)


class DistilBertEncoder(BertEncoder):
    """DistilBERT, https://arxiv.org/abs/1910.01108; summary: as BertEncoder."""

    def __init__(self, config: TextEncoderConfig, vocabulary: int, dropout: float):
        nn.Module.__init__(self)
        shape = transformers.DistilBertConfig(
            vocab_size=vocabulary,
            dim=config.width,
            n_layers=config.layers,
            n_heads=config.heads,
            hidden_dim=4 * config.width,
            dropout=dropout,
            attention_dropout=dropout,
        )
        self.text = _build(transformers.DistilBertModel, shape, config)
        self.width = config.width

    def inherit(self, teacher: BertEncoder) -> None:
        """Start from `teacher`: its embeddings and layers 0, s, 2s, …, where s is how often our depth goes into its.

        A teacher twice as deep gives every other layer (https://arxiv.org/abs/1910.01108, section 3). Widths, heads
        and vocabulary must be equal.
        """
        depth, theirs = self.text.config.n_layers, teacher.text.config.num_hidden_layers
        layers = [layer * (theirs // depth) for layer in range(depth)]
        self.text.load_state_dict(from_bert(teacher.text.state_dict(), layers))


def text_encoder(config: TextEncoderConfig, vocabulary: int, dropout: float) -> nn.Module:
    kinds = {"bert": BertEncoder, "distilbert": DistilBertEncoder}
    return kinds[config.kind](config, vocabulary, dropout)


def from_bert(state: dict[str, torch.Tensor], layers: list[int]) -> dict[str, torch.Tensor]:
    """The embeddings and `layers` of a BertModel's weights, under the names of transformers' DistilBertModel.

    DistilBERT has no token types: that of a first sentence, which BERT adds at every position, goes into the positions.
    """
    embeddings = "embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"
    renamed = {name: state[name] for name in embeddings}
    positions, types = (state[f"embeddings.{kind}_embeddings.weight"] for kind in ("position", "token_type"))
    renamed["embeddings.position_embeddings.weight"] = positions + types[0]
    for place, layer in enumerate(layers):
        for theirs, ours in BERT_TO_DISTILBERT.items():
            for part in ("weight", "bias"):
                source = state[f"encoder.layer.{layer}.{theirs}.{part}"]
                renamed[f"transformer.layer.{place}.{ours}.{part}"] = source
    return renamed
