"""What notebooks import, and all that they import from vqa: Study, and names that a single notebook needs.

Each is imported from its module when it is asked for: some of these take seconds, which most notebooks do not need.
"""

import importlib
from typing import Any

HOMES = {
    "vqa.study.study": ("Study",),
    "vqa.study.report": ("with_interval",),
    "vqa.study.figures.architecture": ("build", "build_meta", "parts"),
    "vqa.study.figures.distillation": ("students",),
    "vqa.study.figures.forensics": ("last_batches",),
    "vqa.config": ("load_profile",),
    "vqa.results": ("EARLIER", "EARLIER_RECIPE", "SOUND", "TAUGHT", "UNTAUGHT"),
    "vqa.data.batches": ("Split",),
    "vqa.models.parts": ("parameter_count",),
    "vqa.evaluation.metrics": ("BlindBaseline", "accuracy_results", "image_only_ceiling", "score"),
    "vqa.deployment.pt2e": ("missing",),
    "vqa.experiments.step_time_model": ("predictions",),
    "vqa.experiments.earlier_study": ("earlier_form", "explained", "reconstructed", "spread"),
}


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"vqa.study has no {name}")
