"""Profiles: the files of `params/`, checked before anything starts, and the runs they describe.

A profile is YAML 1.2, so `3e-4` is a number and `no` is a word. A mistake is one sentence that names the place
and, for a key, the nearest right one.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vqa.config.runs import (
    CAPTIONS_NAME_SIDES,
    ConcatConfig,
    DataConfig,
    DistillationConfig,
    Fraction,
    FusionConfig,
    LaunchConfig,
    ModelConfig,
    Positive,
    RunConfig,
    Share,
    Temperature,
    TrainConfig,
)
from vqa.config.section import ConfigError, Section, near, read_yaml, validate

ROOT = Path(__file__).resolve().parents[3]
PARAMS = ROOT / "params"


class DistillationStudyConfig(Section):
    """What 05_distillation compares."""

    seeds: list[int] = Field(min_length=1)  # of the headline pair
    fractions: list[Share] = Field(min_length=1)  # of the training questions; the first is the headline
    epochs: Positive
    temperatures: list[Temperature]  # all of them with all of alphas
    alphas: list[Fraction]
    inheritance: bool = False  # whether a student that inherits its text tower is trained as well


class ScalingStudyConfig(Section):
    """What 04_scaling measures."""

    world_sizes: list[Positive] = Field([1, 2, 4])  # the first is the reference
    images: Positive  # training images of the runs whose learning is compared
    epochs: Positive
    steps: Positive  # timed steps an arm


class ForensicsStudyConfig(Section):
    """What 07_forensics trains, for each seed and fault on 1, 2 and 4 simulated ranks."""

    seeds: list[int] = Field(min_length=1)
    images: Positive
    epochs: Positive


class Profile(Section):
    """One file of `params/`: the data, the models, how each is trained, and on what."""

    name: str
    seeds: list[int] = Field(min_length=1)
    data: DataConfig
    models: dict[Literal["teacher", "student"], ModelConfig]
    train: dict[Literal["teacher", "student"], TrainConfig]
    alignment: dict[Literal["teacher", "student"], TrainConfig] = Field(
        default_factory=dict
    )  # roles whose towers are aligned first
    distillation: DistillationConfig
    distillation_study: DistillationStudyConfig
    launch: LaunchConfig
    at_once: Positive = 1  # runs side by side, where a notebook asks for several
    benchmark_steps: Positive  # timed steps an arm
    scaling: ScalingStudyConfig
    forensics: ForensicsStudyConfig
    expected: dict[str, float | None] = Field(
        default_factory=dict
    )  # what notebooks expect, by metric; without a number, no verdict
    fusions: list[FusionConfig] = Field(default_factory=list)  # compared in 03_fusion, on the teacher's towers
    compiled: Literal["none", "trained", "all"] = "trained"  # what 06_quantization also compiles; all: full size too
    latency_of: str = "base"  # the profile whose models 06_quantization times, with random weights

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if untrained := sorted(set(self.models) - set(self.train)):
            raise ValueError(f"models.{untrained[0]} has no settings under train")
        return self

    def run(
        self, role: str, seed: int | None = None, aligned: bool = True, distilled: bool = False, **changes: Any
    ) -> RunConfig:
        """The run of `role` under this profile; with `aligned` off, its towers start untrained.

        With `distilled` on, it learns from the profile's teacher of the first seed. `changes` are dotted
        keys of RunConfig with `__` for the dot: `train__epochs=2`.
        Raises ConfigError for a wrong key, type or combination.
        """
        if role not in self.models:
            raise ConfigError(f"no model {role!r} in profile {self.name}: {near(role, self.models)}")
        raw = {
            "role": role,
            "objective": "answers",
            "seed": self.seeds[0] if seed is None else seed,
            "data": self.data.model_dump(),
            "model": self.models[role].model_dump(),
            "train": self.train[role].model_dump(),
            "launch": self.launch.model_dump(),
        }
        if distilled:
            taught = {"teacher": self.run("teacher").model_dump(), "distillation": self.distillation.model_dump()}
            raw |= {"objective": "distillation", **taught}
        for key, value in changes.items():
            _assign(raw, key.replace("__", "."), value)
        if aligned and role in self.alignment:
            raw["parent"] = self._alignment_of(role, raw)
        return validate(RunConfig, raw, f"profile {self.name}")

    def _alignment_of(self, role: str, raw: dict) -> dict:
        """The run that aligns the towers of run `raw`. It has no fusion, so all fusions can share it."""
        data = raw["data"] | {"flips": raw["data"]["flips"] and raw["data"]["source"] not in CAPTIONS_NAME_SIDES}
        return raw | {
            "data": data,
            "objective": "alignment",
            "teacher": None,
            "distillation": None,
            "train": self.alignment[role].model_dump(),
            "model": raw["model"] | {"fusion": ConcatConfig().model_dump()},
        }


def load_profile(name: str, overrides: dict[str, Any] | None = None) -> Profile:
    """The profile `params/<name>.yaml`, its bases, then `overrides` (dotted keys) on top.

    Raises ConfigError, with one sentence, for anything that cannot be used.
    """
    raw = _read(name)
    for key, value in (overrides or {}).items():
        _assign(raw, key, value)
    profile = validate(Profile, {**raw, "name": name}, f"profile {name}")
    for role in profile.models:  # combinations are checked now, not when a notebook gets there
        for fusion in [profile.models[role].fusion, *profile.fusions]:
            profile.run(role, model__fusion=fusion.model_dump())
    return profile


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`["train.teacher.lr=3e-4"]` -> `{"train.teacher.lr": 0.0003}`, values read as YAML 1.2."""
    overrides = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"an override is written KEY=VALUE, not {pair!r}")
        try:
            overrides[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError:
            raise ConfigError(f"the value of override {pair!r} is not YAML") from None
    return overrides


def _read(name: str, seen: tuple[str, ...] = ()) -> dict:
    path = PARAMS / f"{name}.yaml"
    if not path.is_file():
        known = [p.stem for p in PARAMS.glob("*.yaml")]
        raise ConfigError(f"no profile {name!r} in {PARAMS.name}/: {near(name, known)}")
    if name in seen:
        raise ConfigError(f"profile {name} is its own base, through {' -> '.join(seen)}")
    raw = read_yaml(path)
    base = raw.pop("base", None)
    return _merge(_read(base, (*seen, name)), raw) if base else raw


def _merge(below: dict, above: dict) -> dict:
    """`above` on top of `below`, key by key. A null takes a section away; another `kind` replaces it whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if not isinstance(old, dict):
            merged[key] = value
        elif value is None:
            del merged[key]
        elif isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _assign(raw: dict, dotted: str, value: Any) -> None:
    """Put `value` at the place `dotted` in `raw`; a section is merged with what is there, as `base:` does."""
    *path, last = dotted.split(".")
    for depth, key in enumerate(path):
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{'.'.join(path[: depth + 1])} holds a value, so {dotted} cannot be set")
    raw |= _merge({last: raw[last]} if last in raw else {}, {last: value})
    if value is None and isinstance(raw.get(last), dict):
        del raw[last]
