"""A model's parts by the `kind` in their config. A new tower or fusion gets a line here."""

from torch import nn

from vqa.config import ModelConfig
from vqa.models.concat import ConcatFusion
from vqa.models.cross_attention import CrossAttentionFusion
from vqa.models.image_towers import ResNet18Encoder, ViTEncoder
from vqa.models.text_towers import BertEncoder, DistilBertEncoder

IMAGE_TOWERS = {"vit": ViTEncoder, "resnet18": ResNet18Encoder}
TEXT_TOWERS = {"bert": BertEncoder, "distilbert": DistilBertEncoder}
FUSIONS = {"concat": ConcatFusion, "cross_attention": CrossAttentionFusion}


def without_public_weights(config: ModelConfig) -> ModelConfig:
    """`config` with random weights in both towers: for weights that are loaded next, or never needed."""
    none = {"pretrained": None, "revision": None}
    towers = {name: getattr(config, name).model_copy(update=none) for name in ("image_encoder", "text_encoder")}
    return config.model_copy(update=towers)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
