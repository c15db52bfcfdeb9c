"""Everything that decides what one training run or one measurement computes. Its hash names the run's folder."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vqa.config.section import Section, near
from vqa.results import KINDS

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a branch or a tag could be moved
CAPTIONS_NAME_SIDES = ("sort_of_clevr",)  # data sets whose captions a mirrored image would belie


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


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")


class Tower(Section):
    """What every tower has."""

    width: Positive = 768
    pretrained: str | None = None  # a hub id, a local folder, or for ResNet18 a torchvision weight name
    revision: Commit | None = None  # of the hub; required with a hub id


class TransformerTower(Tower):
    layers: Positive = 12
    heads: Positive = 12

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _check_heads(self.width, self.heads)
        return self


class ViTConfig(TransformerTower):
    kind: Literal["vit"]
    layers: Annotated[int, Field(ge=0)] = 12  # 0: the stem and positions alone
    patch_size: Positive = 16
    stem: Literal["patch", "conv", "strided"] = "patch"  # conv: Xiao et al. 2021; strided: half of it

    @model_validator(mode="after")
    def _stem_halves(self) -> Self:
        if self.stem != "patch" and self.patch_size not in (4, 8, 16):
            raise ValueError(f"a {self.stem} stem needs patch_size 4, 8 or 16, not {self.patch_size}")
        return self


class ResNet18Config(Tower):
    kind: Literal["resnet18"]  # width: channels of the last stage

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if self.width % 8:
            raise ValueError(f"width {self.width} is not a multiple of 8, as its four stages need")
        return self


class TextTowerConfig(TransformerTower):
    kind: Literal["bert", "distilbert"]


class ConcatConfig(Section):
    kind: Literal["concat"] = "concat"
    width: Positive = 256


class AttendingFusion(Section):
    """What the fusions that attend to image tokens have in common."""

    width: Positive = 256
    layers: Positive = 2
    heads: Positive = 4

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        _check_heads(self.width, self.heads)
        return self


class CrossAttentionConfig(AttendingFusion):
    kind: Literal["cross_attention"]
    queries: Literal["tokens", "summary"] = "tokens"  # what of a question meets the image


class UnifiedDecoderConfig(AttendingFusion):
    kind: Literal["unified_decoder"]


ImageTowerConfig = Annotated[ViTConfig | ResNet18Config, Field(discriminator="kind")]
FusionConfig = Annotated[ConcatConfig | CrossAttentionConfig | UnifiedDecoderConfig, Field(discriminator="kind")]


class ModelConfig(Section):
    image_encoder: ImageTowerConfig
    text_encoder: TextTowerConfig
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
    checkpoint_every_steps: Positive = 100  # between two that a stop can go on from


class DistillationConfig(Section):
    """What a student learns from, after https://arxiv.org/abs/1503.02531: the teacher's answers and features."""

    temperature: Temperature  # of both models' answers where they are compared
    alpha: Fraction  # weight of the teacher's answers; the labels have the rest
    feature_weight: Annotated[float, Field(ge=0)]  # of both towers' summaries, through projections
    token_weight: Annotated[float, Field(ge=0)]  # of the question's tokens, through a projection
    inherit_text: bool = False  # start the text tower from layers of the teacher's, as DistilBERT does


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
    def model_name(self) -> str:
        """What results call this model: teacher, student, or distilled."""
        return "distilled" if self.objective == "distillation" else self.role

    @property
    def name(self) -> str:
        fusion = self.model.fusion.kind
        middle = {"alignment": "alignment", "distillation": f"{fusion}-distilled", "answers": fusion}[self.objective]
        return f"{self.role}-{middle}-seed{self.seed}"

    @property
    def needed(self) -> "list[RunConfig]":
        """What must be finished first: the run of the aligned towers, and the teacher's."""
        return [run for run in (self.parent, self.teacher) if run]


class MeasurementConfig(Section):
    """One measurement: its `kind` (one of results.KINDS), the runs it is made on, how many steps an arm is timed."""

    kind: str
    runs: list[RunConfig] = Field(min_length=1)  # the first names it and says on how many ranks
    steps: Annotated[int, Field(ge=0)] = 0
    simulated_ranks: Positive | None = None  # forensics
    reference: Self | None = None  # parity: the same on one rank, which it is compared with

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.kind not in KINDS:
            raise ValueError(f"no measurement {self.kind!r}; {near(self.kind, KINDS)}")
        return self

    @property
    def launch(self) -> LaunchConfig:
        return self.runs[0].launch

    @property
    def name(self) -> str:
        first, ranks = self.runs[0], self.simulated_ranks or self.launch.world_size
        what = f"{first.role}-{'alignment' if first.objective == 'alignment' else first.model.fusion.kind}"
        return f"{self.kind}-{what}-seed{first.seed}" + (f"-{ranks}-ranks" if ranks > 1 else "")

    @property
    def needed(self) -> "list[MeasurementConfig]":
        """What must be finished first. Runs that are only timed need not be trained, so they are not among it."""
        return [self.reference] if self.reference else []
