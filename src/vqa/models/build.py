"""How an image and a question become an answer: three fusions with one interface.

A fusion takes the two towers' Features, encoded once, and the index maps that say which image and
which question make up each of the N pairs; it gives one vector per pair, (N, width).
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vqa.config import ModelConfig
from vqa.models.unified_decoder import UnifiedDecoderModel
from vqa.models.vqa_model import VQAModel


def vqa_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, answers: list[str], image_size: int) -> VQAModel:
    """The model that `config` describes, with fresh weights (or public ones in its towers)."""
    return _kind(config.fusion.kind)(config, tokenizer, answers, image_size)


def load_vqa_model(folder: Path) -> VQAModel:
    """The model saved in `folder`, in eval mode."""
    return _kind(json.loads((folder / "config.json").read_text())["model"]["fusion"]["kind"]).from_pretrained(folder)


def _kind(fusion: str) -> type[VQAModel]:
    return UnifiedDecoderModel if fusion == "unified_decoder" else VQAModel
