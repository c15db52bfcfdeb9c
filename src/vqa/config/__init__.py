"""What a study is made of: profiles, runs and measurements, checked and named.

The sections of single towers and fusions are in vqa.config.runs.
"""

# ruff: noqa: F401  what other folders import from here

from vqa.config.profile import PARAMS, ROOT, Profile, load_profile, parse_overrides
from vqa.config.runs import (
    DataConfig,
    LaunchConfig,
    MeasurementConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from vqa.config.section import ConfigError, Section, digest, load_section, near, save_yaml
