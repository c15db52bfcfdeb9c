"""What a study is made of: profiles, runs and measurements, checked and named."""

from vqa.config.profile import PARAMS, ROOT, Profile, load_profile, parse_overrides
from vqa.config.runs import (
    ConcatConfig,
    CrossAttentionConfig,
    DataConfig,
    DistillationConfig,
    FusionConfig,
    ImageTowerConfig,
    LaunchConfig,
    MeasurementConfig,
    ModelConfig,
    ResNet18Config,
    RunConfig,
    TextTowerConfig,
    TrainConfig,
    UnifiedDecoderConfig,
    ViTConfig,
)
from vqa.config.section import ConfigError, Section, digest, load_section, near, save_yaml

__all__ = [
    "PARAMS", "ROOT", "ConcatConfig", "ConfigError", "CrossAttentionConfig", "DataConfig", "DistillationConfig",
    "FusionConfig", "ImageTowerConfig", "LaunchConfig", "MeasurementConfig", "ModelConfig", "Profile",
    "ResNet18Config", "RunConfig", "Section", "TextTowerConfig", "TrainConfig", "UnifiedDecoderConfig", "ViTConfig",
    "digest", "load_profile", "load_section", "near", "parse_overrides", "save_yaml",
]  # fmt: skip
