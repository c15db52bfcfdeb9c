"""The configuration of a study: a profile file, overrides, and the runs they describe.

A profile (`params/<name>.yaml`) is YAML 1.2, so `3e-4` is a number and `no` is a word. Its keys
and types are checked by pydantic before anything starts; a mistake is one sentence that names the
place and, for a key, the nearest right one. `python -m vqa.config PROFILE` prints the resolved
profile, or that sentence.
"""

import argparse
import difflib
import hashlib
import json
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "params"


class ConfigError(ValueError):
    """A profile or an override that cannot be used; its message is one sentence for the user."""


class Section(BaseModel):
    """Common rules of every part: no unknown keys, no silent conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


S = TypeVar("S", bound=Section)
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
CAPTIONS_NAME_SIDES = ("sort_of_clevr",)  # data sets whose captions a mirrored image would belie
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a branch or a tag could be moved


class DataConfig(Section):
    source: Literal["easy_vqa", "sort_of_clevr", "vqa_v2"]
    root: str | None = None  # vqa_v2 only: the folder of the official files, seen from the repository
    image_size: Positive = 64  # pixels a side, after resizing
    validation_images: Positive  # held out of the training split, by image
    split_seed: int = 0  # which images are held out; the same for every seed of a run
    train_images: Positive | None = None  # use only the first so many (shuffled); None: all
    test_images: Positive | None = None
    question_fraction: Share = 1.0  # of each training image's questions, at least one an image
    flips: bool = True  # mirror images at random (left-right, top-bottom), and answers that name sides with them

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source == "vqa_v2" and self.root is None:
            raise ValueError("vqa_v2 needs data.root, the folder of its official files")
        if self.source != "vqa_v2" and self.root is not None:
            raise ValueError(f"data.root is for vqa_v2; {self.source} has no files to look for")
        if self.source == "vqa_v2" and self.flips:
            raise ValueError("data.flips must be false for vqa_v2: photographs have a left, a top and writing")
        return self


class ImageEncoderConfig(Section):
    kind: Literal["vit", "resnet18"]
    width: Positive = 768  # ViT: hidden size; ResNet18: channels of the last stage
    layers: Annotated[int, Field(ge=0)] = 12  # ViT only: ResNet18 has its 18 by name; 0: the stem and positions alone
    heads: Positive = 12  # ViT only
    patch_size: Positive = 16  # ViT only
    stem: Literal["patch", "conv", "strided"] = "patch"  # ViT only; conv: Xiao et al. 2021; strided: half of it
    pretrained: str | None = None  # a hub id, a local folder, or for ResNet18 a torchvision weight name
    revision: Commit | None = None  # of the hub; required with a hub id

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "vit" and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.kind == "vit" and self.stem != "patch" and self.patch_size not in (4, 8, 16):
            raise ValueError(f"a {self.stem} stem needs patch_size 4, 8 or 16, not {self.patch_size}")
        if self.kind == "resnet18" and self.width % 8:
            raise ValueError(f"width {self.width} is not a multiple of 8, as its four stages need")
        return self


class TextEncoderConfig(Section):
    kind: Literal["bert", "distilbert"]
    width: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    pretrained: str | None = None
    revision: Commit | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class FusionConfig(Section):
    kind: Literal["concat", "cross_attention", "unified_decoder"] = "concat"
    width: Positive = 256
    layers: Positive = 2  # concat has none
    heads: Positive = 4
    queries: Literal["tokens", "summary"] = "tokens"  # cross attention: what of a question meets the image

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ModelConfig(Section):
    image_encoder: ImageEncoderConfig
    text_encoder: TextEncoderConfig
    fusion: FusionConfig
    dropout: Fraction = 0.0
    max_question_tokens: Positive = 32


class TrainConfig(Section):
    epochs: Positive
    global_batch_size: Positive = 32  # images a step, over all ranks and accumulation steps
    gradient_accumulation_steps: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_fraction: Fraction = 0.05  # of all steps; cosine to zero afterwards
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    amp: Literal["off", "bf16"] = "off"
    gradient_checkpointing: bool = False
    compile: bool = False
    patience: Positive | None = None  # epochs without a better validation before stopping
    checkpoint_every_steps: Positive = 100  # between two that a stop can go on from


class DistillationConfig(Section):
    """What a student learns from, after https://arxiv.org/abs/1503.02531: the teacher's answers and features."""

    temperature: Temperature  # of both models' answers where they are compared
    alpha: Fraction  # weight of the teacher's answers; the labels have the rest
    feature_weight: Annotated[float, Field(ge=0)]  # of both towers' summaries, through projections
    token_weight: Annotated[float, Field(ge=0)]  # of the question's tokens, through a projection
    inherit_text: bool = False  # start the text tower from layers of the teacher's, as DistilBERT does


class DistillationStudyConfig(Section):
    """What 05_distillation compares."""

    seeds: list[int] = Field(min_length=1)  # of the headline pair
    fractions: list[Share] = Field(min_length=1)  # of the training questions; the first is the headline
    epochs: Positive
    temperatures: list[Temperature]  # all of them with all of alphas
    alphas: list[Fraction]
    inheritance: bool = False  # whether a student that inherits its text tower is trained as well


class LaunchConfig(Section):
    world_size: Positive = 1
    device: Literal["cpu", "cuda"] = "cpu"
    threads_per_rank: Positive = 2


class RunConfig(Section):
    """All that decides what one training run computes. Its hash names the run folder."""

    role: str  # teacher | student
    objective: Literal["answers", "alignment", "distillation"]
    seed: int
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    launch: LaunchConfig
    parent: Self | None = None  # the alignment run whose towers this one starts from
    teacher: Self | None = None  # the run whose answers and features a student is given
    distillation: DistillationConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.objective == "alignment" and self.data.flips and self.data.source in CAPTIONS_NAME_SIDES:
            raise ValueError(f"data.flips must be false to align on {self.data.source}, whose captions name sides")
        encoder, size = self.model.image_encoder, self.data.image_size
        parts = self.launch.world_size * self.train.gradient_accumulation_steps
        if encoder.kind == "vit" and size % encoder.patch_size:
            raise ValueError(f"data.image_size {size} is not a multiple of patch_size {encoder.patch_size}")
        if self.train.global_batch_size % parts:
            raise ValueError(
                f"train.global_batch_size {self.train.global_batch_size} does not divide evenly by "
                f"world_size x gradient_accumulation_steps = {parts}"
            )
        if self.objective == "alignment" and self.train.gradient_accumulation_steps > 1:
            raise ValueError("alignment compares all pairs of a step, so it cannot accumulate gradients")
        if self.objective == "alignment" and self.data.question_fraction < 1:
            raise ValueError("data.question_fraction does not go with alignment, whose captions use all questions")
        if self.objective == "distillation":
            self._check_teacher()
        return self

    def _check_teacher(self) -> None:
        if not (self.distillation and self.teacher and self.teacher.objective == "answers"):
            raise ValueError("distillation needs a distillation section and a teacher run that learned answers")
        for key in ("source", "image_size", "validation_images", "split_seed"):  # else it may know our held-out images
            ours, theirs = getattr(self.data, key), getattr(self.teacher.data, key)
            if ours != theirs:
                raise ValueError(f"the teacher was trained with data.{key} {theirs}, the student with {ours}")
        if "unified_decoder" in (self.model.fusion.kind, self.teacher.model.fusion.kind):
            raise ValueError("distillation compares two towers' summaries, and a unified_decoder has one tower")
        if self.distillation.inherit_text:
            self._check_inheritance()

    def _check_inheritance(self) -> None:
        ours, theirs = self.model.text_encoder, self.teacher.model.text_encoder
        if (ours.kind, theirs.kind) != ("distilbert", "bert"):
            raise ValueError(
                f"distillation.inherit_text makes a distilbert of a bert, not a {ours.kind} of a {theirs.kind}"
            )
        for key in ("width", "heads"):
            if getattr(ours, key) != getattr(theirs, key):
                raise ValueError(
                    f"distillation.inherit_text needs text towers of equal {key}: the teacher's has "
                    f"{getattr(theirs, key)}, the student's {getattr(ours, key)}"
                )
        if ours.layers > theirs.layers:
            raise ValueError(
                f"distillation.inherit_text cannot take {ours.layers} layers from a teacher's text tower "
                f"of {theirs.layers}"
            )

    @property
    def kind(self) -> str:
        """What results call this model: teacher, student, or distilled."""
        return "distilled" if self.objective == "distillation" else self.role

    @property
    def name(self) -> str:
        fusion = self.model.fusion.kind
        middle = {"alignment": "alignment", "distillation": f"{fusion}-distilled", "answers": fusion}[self.objective]
        return f"{self.role}-{middle}-seed{self.seed}"


class ScalingStudyConfig(Section):
    """What 04_scaling measures."""

    world_sizes: list[Positive] = [1, 2, 4]  # the first is the reference
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
    alignment: dict[Literal["teacher", "student"], TrainConfig] = {}  # roles whose towers are aligned first
    distillation: DistillationConfig
    distillation_study: DistillationStudyConfig
    launch: LaunchConfig
    at_once: Positive = 1  # runs side by side, where a notebook asks for several
    benchmark_steps: Positive  # timed steps an arm
    scaling: ScalingStudyConfig
    forensics: ForensicsStudyConfig
    fusions: list[FusionConfig] = []  # compared in 03_fusion, on the teacher's towers
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
        return _validate(RunConfig, raw, f"profile {self.name}")

    def _alignment_of(self, role: str, raw: dict) -> dict:
        """The run that aligns the towers of run `raw`. It has no fusion, so all fusions can share it."""
        data = raw["data"] | {"flips": raw["data"]["flips"] and raw["data"]["source"] not in CAPTIONS_NAME_SIDES}
        return raw | {
            "data": data,
            "objective": "alignment",
            "teacher": None,
            "distillation": None,
            "train": self.alignment[role].model_dump(),
            "model": raw["model"] | {"fusion": FusionConfig().model_dump()},
        }


def load_profile(name: str, overrides: dict[str, Any] | None = None) -> Profile:
    """The profile `params/<name>.yaml`, its bases, then `overrides` (dotted keys) on top.

    Raises ConfigError, with one sentence, for anything that cannot be used.
    """
    raw = _read(name)
    for key, value in (overrides or {}).items():
        _assign(raw, key, value)
    profile = _validate(Profile, {**raw, "name": name}, f"profile {name}")
    for role in profile.models:  # combinations are checked now, not when a notebook gets there
        for fusion in [profile.models[role].fusion, *profile.fusions]:
            profile.run(role, model__fusion=fusion.model_dump())
    return profile


def load_section(kind: type[S], path: Path) -> S:
    """The section that `save_yaml` stored at `path`."""
    return _validate(kind, _yaml(path), str(path))


def save_yaml(section: Section, path: Path) -> None:
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(section.model_dump(), file)


def digest(section: Section) -> str:
    """Eight hex digits that change when any resolved value changes."""
    text = json.dumps(section.model_dump(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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
    raw = _yaml(path)
    base = raw.pop("base", None)
    return _merge(_read(base, (*seen, name)), raw) if base else raw


def _yaml(path: Path) -> dict:
    try:
        raw = YAML(typ="safe", pure=True).load(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path.name}{line} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path.name} holds no keys")
    return raw


def _merge(below: dict, above: dict) -> dict:
    """`above` on top of `below`, key by key; a null takes a whole section of `below` away."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        if value is None and isinstance(merged.get(key), dict):
            del merged[key]
        else:
            merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(raw: dict, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for depth, key in enumerate(path):
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{'.'.join(path[: depth + 1])} holds a value, so {dotted} cannot be set")
    raw[last] = value


def _validate(kind: type[S], raw: dict, where: str) -> S:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(kind, error)}") from None


def _sentence(kind: type[Section], error: ValidationError) -> str:
    """The first problem of `error`, in words."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "[key]"]
    dotted = ".".join(place)
    known = _keys_at(kind, place[:-1]) if place else []
    if known and place[-1] not in known:
        return f"unknown key {dotted}; {near(place[-1], known)}"
    if first["type"] == "missing":
        return f"the key {dotted} is missing"
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{dotted}: {said}" if dotted else said
    return f"{dotted} is {first['input']!r}: {said[0].lower()}{said[1:]}"


def _keys_at(annotation: Any, path: list[str]) -> list[str]:
    """The keys that the schema allows below `path`; none where it allows anything."""
    if get_origin(annotation) is dict:
        names, values = get_args(annotation)
        return _keys_at(values, path[1:]) if path else list(get_args(names))
    if get_origin(annotation) is UnionType:  # a section that may be left out
        return _keys_at(get_args(annotation)[0], path)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields
        return _keys_at(fields[path[0]].annotation, path[1:]) if path else list(fields)
    return []


def near(word: str, known: Any) -> str:
    known = list(known)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(sorted(known))}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a profile and print it resolved.")
    parser.add_argument("profile")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    try:
        profile = load_profile(arguments.profile, parse_overrides(arguments.overrides))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    YAML(typ="safe", pure=True).dump(profile.model_dump(), sys.stdout)


if __name__ == "__main__":
    main()
