"""From a config, or from a saved folder, to the model."""

import json
from pathlib import Path

from vqa.config import ModelConfig
from vqa.data.processor import Processor
from vqa.models.unified_decoder import UnifiedDecoderModel
from vqa.models.vqa_model import VQAModel

AnyVQAModel = VQAModel | UnifiedDecoderModel


def vqa_model(config: ModelConfig, processor: Processor) -> AnyVQAModel:
    """The model that `config` describes, with fresh weights (or public ones in its towers)."""
    return _kind(config.fusion.kind)(config, processor)


def load_vqa_model(folder: Path) -> AnyVQAModel:
    """The model saved in `folder`, in eval mode."""
    return _kind(json.loads((folder / "config.json").read_text())["model"]["fusion"]["kind"]).from_pretrained(folder)


def _kind(fusion: str) -> type[AnyVQAModel]:
    return UnifiedDecoderModel if fusion == "unified_decoder" else VQAModel
