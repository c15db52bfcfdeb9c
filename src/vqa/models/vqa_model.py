"""The models: two towers with a fusion and an answer head, or with projections to align them.

Teacher and student are configs of VQAModel, not classes of their own.

Shapes, here and in all of `models/`:
    I images · U distinct questions · N (image, question) pairs · P image tokens · T text tokens
    D width (each tower has its own) · A answers · H, W pixels
"""

import json
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vqa.config import FusionConfig, ModelConfig
from vqa.data.batches import Batch
from vqa.models.concat import ConcatFusion
from vqa.models.cross_attention import CrossAttentionFusion
from vqa.models.image_towers import image_encoder
from vqa.models.layers import Features
from vqa.models.text_towers import text_encoder
from vqa.training.losses import answer_loss


class TwoTowers(nn.Module):
    """An image tower and a text tower, and the folder they are kept in.

    `tokenizer` and `answers` travel with the weights: without them the numbers mean nothing.
    """

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, answers: list[str], image_size: int):
        super().__init__()
        self.config, self.tokenizer, self.answers, self.image_size = config, tokenizer, answers, image_size
        self.image_encoder = image_encoder(config.image_encoder, image_size, config.dropout)
        self.text_encoder = text_encoder(config.text_encoder, len(tokenizer), config.dropout)

    def checkpoint_gradients(self) -> None:
        """Keep only each transformer layer's input for the backward pass; compute the rest again there."""
        self.image_encoder.checkpoint_gradients()
        self.text_encoder.checkpoint_gradients()

    def save(self, folder: Path) -> None:
        """config.json, model.safetensors, the tokenizer's files. `folder` must be empty or absent."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"model": self.config.model_dump(), "answers": self.answers, "image_size": self.image_size}
        (folder / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
        save_model(self, str(folder / "model.safetensors"))
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """The model that `save` wrote, in eval mode. Raises FileNotFoundError if a file is missing."""
        kept = json.loads((folder / "config.json").read_text())
        model = cls(
            without_public_weights(ModelConfig.model_validate(kept["model"])),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            kept["answers"],
            kept["image_size"],
        )
        load_model(model, str(folder / "model.safetensors"))
        return model.eval()


class Reading(NamedTuple):
    """What a model makes of a batch."""

    logits: torch.Tensor  # (N, A)
    image: torch.Tensor  # (I, D) the image tower's summaries
    text: torch.Tensor  # (U, D) the text tower's
    tokens: torch.Tensor  # (U, T, D) what the text tower says of each token, padding included


class VQAModel(TwoTowers):
    """Scores every answer of a closed list for each (image, question) pair."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, answers: list[str], image_size: int):
        super().__init__(config, tokenizer, answers, image_size)
        self.fusion = fusion(config.fusion, self.image_encoder.width, self.text_encoder.width)
        self.answer_head = nn.Linear(self.fusion.width, len(answers))

    def forward(
        self,
        pixel_values: torch.Tensor,  # (I, 3, H, W) uint8
        image_index: torch.Tensor,  # (N,)
        input_ids: torch.Tensor,  # (U, T)
        attention_mask: torch.Tensor,  # (U, T)
        question_index: torch.Tensor,  # (N,)
    ) -> torch.Tensor:
        return self.read(pixel_values, image_index, input_ids, attention_mask, question_index).logits

    def read(
        self,
        pixel_values: torch.Tensor,  # (I, 3, H, W) uint8
        image_index: torch.Tensor,  # (N,)
        input_ids: torch.Tensor,  # (U, T)
        attention_mask: torch.Tensor,  # (U, T)
        question_index: torch.Tensor,  # (N,)
    ) -> "Reading":
        """The scores with the towers' summaries and the question's tokens, for a student to learn from or by."""
        image = self.image_encoder(pixel_values)  # (I, P, D), (I, D)
        text = self.text_encoder(input_ids, attention_mask)  # (U, T, D), (U, D)
        joint = self.fusion(image, text, attention_mask, image_index, question_index)  # (N, D)
        return Reading(self.answer_head(joint), image.pooled, text.pooled, text.tokens)

    @torch.no_grad()
    def towers(self, batch: Batch) -> tuple[Features, Features]:
        """What the two towers say of the images and questions of `batch`."""
        return self.image_encoder(batch.pixel_values), self.text_encoder(batch.input_ids, batch.attention_mask)

    def loss(self, network: nn.Module, batch: Batch, pairs: int) -> torch.Tensor:
        """Cross-entropy summed over `batch`, as a share of `pairs`. `network` is this model, perhaps inside DDP."""
        return answer_loss(network(**batch.inputs()), batch.labels, pairs)

    def take_towers(self, folder: Path) -> None:
        """Start from the towers of an AlignmentModel saved in `folder`; fusion and head stay as they are."""
        towers = AlignmentModel.from_pretrained(folder)
        self.image_encoder.load_state_dict(towers.image_encoder.state_dict())
        self.text_encoder.load_state_dict(towers.text_encoder.state_dict())


class AlignmentModel(TwoTowers):
    """Both towers projected into one space in which an image lies near its caption (CLIP)."""

    WIDTH = 128
    MAX_SCALE = 100.0

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, answers: list[str], image_size: int):
        super().__init__(config, tokenizer, answers, image_size)
        self.image_projection = nn.Linear(self.image_encoder.width, self.WIDTH, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.width, self.WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(
        self,
        pixel_values: torch.Tensor,  # (I, 3, H, W) uint8
        image_index: torch.Tensor,  # (N,)
        input_ids: torch.Tensor,  # (U, T)
        attention_mask: torch.Tensor,  # (U, T)
        question_index: torch.Tensor,  # (N,)
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit vectors of the N images and the N captions, (N, WIDTH) each, and the scale of their products."""
        images = self.image_projection(self.image_encoder(pixel_values).pooled)  # (I, WIDTH)
        captions = self.text_projection(self.text_encoder(input_ids, attention_mask).pooled)  # (U, WIDTH)
        scale = self.log_scale.exp().clamp(max=self.MAX_SCALE)
        return normalize(images)[image_index], normalize(captions)[question_index], scale


def without_public_weights(config: ModelConfig) -> ModelConfig:
    """`config` with random weights in both towers: for weights that are loaded next, or never needed."""
    none = {"pretrained": None, "revision": None}
    towers = {name: getattr(config, name).model_copy(update=none) for name in ("image_encoder", "text_encoder")}
    return config.model_copy(update=towers)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fusion(config: FusionConfig, image_width: int, text_width: int) -> nn.Module:
    kinds = {"concat": ConcatFusion, "cross_attention": CrossAttentionFusion}
    return kinds[config.kind](config, image_width, text_width)
