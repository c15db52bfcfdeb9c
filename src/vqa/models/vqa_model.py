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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from vqa.config import ModelConfig
from vqa.data.batches import UNKNOWN_ANSWER, Batch
from vqa.data.processor import Processor
from vqa.models.layers import Features
from vqa.models.parts import FUSIONS, IMAGE_TOWERS, TEXT_TOWERS, without_public_weights


class SavedModel(nn.Module):
    """A model and what its weights mean nothing without: a config and a processor, kept in one folder."""

    def __init__(self, config: ModelConfig, processor: Processor):
        super().__init__()
        self.config, self.processor = config, processor

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and tokenizer.json. `folder` must be empty or absent."""
        folder.mkdir(parents=True, exist_ok=True)
        towers = [(name, module) for name, module in self.named_modules() if isinstance(module, PreTrainedModel)]
        library = {name.split(".")[0]: module.config.to_dict() for name, module in towers}  # its parts share its config
        self.processor.save(folder, model=self.config.model_dump(), library=library)
        save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """The model that `save` wrote, in eval mode. Raises FileNotFoundError if a file is missing."""
        saved = json.loads((folder / "config.json").read_text())
        config = without_public_weights(ModelConfig.model_validate(saved["model"]))
        model = cls(config, Processor.load(folder), saved["library"])
        load_model(model, str(folder / "model.safetensors"))
        return model.eval()


class TwoTowers(SavedModel):
    """An image tower and a text tower. `library`: their own configs, where they were saved before (see `build`)."""

    def __init__(self, config: ModelConfig, processor: Processor, library: dict[str, dict] | None = None):
        super().__init__(config, processor)
        image, text, dropout, own = config.image_encoder, config.text_encoder, config.dropout, library or {}
        words = processor.vocabulary_size
        self.image_encoder = IMAGE_TOWERS[image.kind](image, processor.image_size, dropout, own.get("image_encoder"))
        self.text_encoder = TEXT_TOWERS[text.kind](text, words, dropout, own.get("text_encoder"))

    def checkpoint_gradients(self) -> None:
        """Keep only each transformer layer's input for the backward pass; compute the rest again there."""
        self.image_encoder.checkpoint_gradients()
        self.text_encoder.checkpoint_gradients()


class VQAOutput(NamedTuple):
    """What a model makes of a batch; None where it has no such thing."""

    loss: Tensor | None  # () where labels were given
    logits: Tensor | None  # (N, A)
    image: Tensor | None = None  # (I, D) the image tower's summaries
    text: Tensor | None = None  # (U, D) the text tower's
    tokens: Tensor | None = None  # (U, T, D) what the text tower says of each token, padding included


class VQAModel(TwoTowers):
    """Scores every answer of a closed list for each (image, question) pair."""

    def __init__(self, config: ModelConfig, processor: Processor, library: dict[str, dict] | None = None):
        super().__init__(config, processor, library)
        widths = self.image_encoder.width, self.text_encoder.width
        self.fusion = FUSIONS[config.fusion.kind](config.fusion, *widths)
        self.answer_head = nn.Linear(self.fusion.width, len(processor.answers))

    def forward(
        self,
        pixel_values: Tensor,  # (I, 3, H, W) uint8
        image_index: Tensor,  # (N,)
        input_ids: Tensor,  # (U, T)
        attention_mask: Tensor,  # (U, T)
        question_index: Tensor,  # (N,)
        labels: Tensor | None = None,  # (N,) UNKNOWN_ANSWER adds nothing to the loss
        num_items_in_batch: int | None = None,
    ) -> VQAOutput:
        """The scores, and with `labels` their cross-entropy summed over N and divided by `num_items_in_batch` (or N).

        The caller gives the pairs of the whole step, so that the shares of ranks and accumulation steps add up.
        """
        image = self.image_encoder(pixel_values)  # (I, P, D), (I, D)
        text = self.text_encoder(input_ids, attention_mask)  # (U, T, D), (U, D)
        joint = self.fusion(image, text, attention_mask, image_index, question_index)  # (N, D)
        logits, loss = self.answer_head(joint), None  # (N, A)
        if labels is not None:
            summed = cross_entropy(logits.float(), labels, ignore_index=UNKNOWN_ANSWER, reduction="sum")
            loss = summed / (num_items_in_batch or len(labels))
        return VQAOutput(loss, logits, image.pooled, text.pooled, text.tokens)

    @torch.no_grad()
    def towers(self, batch: Batch) -> tuple[Features, Features]:
        """What the two towers say of the images and questions of `batch`."""
        return self.image_encoder(batch.pixel_values), self.text_encoder(batch.input_ids, batch.attention_mask)

    def load_towers(self, folder: Path) -> None:
        """Start from the towers of an AlignmentModel saved in `folder`; fusion and head stay as they are."""
        towers = AlignmentModel.from_pretrained(folder)
        self.image_encoder.load_state_dict(towers.image_encoder.state_dict())
        self.text_encoder.load_state_dict(towers.text_encoder.state_dict())


class AlignmentModel(TwoTowers):
    """Both towers projected into one space in which an image lies near its caption (CLIP)."""

    WIDTH = 128
    MAX_SCALE = 100.0

    def __init__(self, config: ModelConfig, processor: Processor, library: dict[str, dict] | None = None):
        super().__init__(config, processor, library)
        self.image_projection = nn.Linear(self.image_encoder.width, self.WIDTH, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.width, self.WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(
        self,
        pixel_values: Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        question_index: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of the N images and the N captions, (N, WIDTH) each, and the scale of their products."""
        images = self.image_projection(self.image_encoder(pixel_values).pooled)  # (I, WIDTH)
        captions = self.text_projection(self.text_encoder(input_ids, attention_mask).pooled)  # (U, WIDTH)
        scale = self.log_scale.exp().clamp(max=self.MAX_SCALE)
        return normalize(images)[image_index], normalize(captions)[question_index], scale
