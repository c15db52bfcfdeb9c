"""The towers that read a question: BERT and DistilBERT, the library's own classes."""

import transformers
from torch import Tensor, nn

from vqa.config.runs import TextTowerConfig
from vqa.models.layers import Features
from vqa.models.pretrained import build, checkpoint_layers, public_folder, transformer_sizes

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


class TextTower(nn.Module):
    """One of the library's models of text; summary: the mean of the question's tokens."""

    def __init__(self, text: nn.Module, width: int):
        super().__init__()
        self.text, self.width = text, width

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Features:
        tokens = self.text(input_ids, attention_mask=attention_mask).last_hidden_state  # (U, T, D)
        weights = attention_mask / attention_mask.sum(1, keepdim=True)  # (U, T), padding weighs nothing
        return Features(tokens, (weights.to(tokens.dtype)[:, None, :] @ tokens).squeeze(1))

    def checkpoint_gradients(self) -> None:
        checkpoint_layers(self.text)


class BertEncoder(TextTower):
    """BERT, https://arxiv.org/abs/1810.04805."""

    def __init__(self, config: TextTowerConfig, vocabulary: int, dropout: float, library: dict | None = None):
        asked, public = transformer_sizes(config, dropout) | {"vocab_size": vocabulary}, public_folder(config)
        text = build(transformers.BertModel, config, asked, public, library, add_pooling_layer=False)
        super().__init__(text, config.width)


class DistilBertEncoder(TextTower):
    """DistilBERT, https://arxiv.org/abs/1910.01108."""

    def __init__(self, config: TextTowerConfig, vocabulary: int, dropout: float, library: dict | None = None):
        asked = {
            "vocab_size": vocabulary,
            "dim": config.width,
            "n_layers": config.layers,
            "n_heads": config.heads,
            "hidden_dim": 4 * config.width,
            "dropout": dropout,
            "attention_dropout": dropout,
        }
        text = build(transformers.DistilBertModel, config, asked, public_folder(config), library)
        super().__init__(text, config.width)

    def init_from_teacher(self, teacher: BertEncoder) -> None:
        """Start from `teacher`: its embeddings and layers 0, s, 2s, …, where s is how often our depth goes into its.

        A teacher twice as deep gives every other layer (https://arxiv.org/abs/1910.01108, section 3). Widths, heads
        and vocabulary must be equal.
        """
        depth, theirs = self.text.config.n_layers, teacher.text.config.num_hidden_layers
        layers = [layer * (theirs // depth) for layer in range(depth)]
        self.text.load_state_dict(from_bert(teacher.text.state_dict(), layers))


def from_bert(state: dict[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
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
