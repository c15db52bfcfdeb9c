"""The figures of 01_architecture, and the models they count."""

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from vqa.config import Profile, load_profile
from vqa.models.vqa_model import VQAModel, parameter_count, without_public_weights
from vqa.study.figures.style import GREYS, HATCHES, figure
from vqa.study.records import Report
from vqa.training.objectives import Answers, tokenizer_for

BERT_VOCABULARY = 30522


@figure
def towers(report: "Report") -> Figure:
    """Both models of the profile as blocks, with the shapes that flow through them, measured by running them."""
    made, axes = pyplot.subplots(1, 2, figsize=(13, 5.2))
    for axis, role in zip(axes, ("teacher", "student"), strict=True):
        draw_model(axis, build(report, role), role)
    return made


@figure
def parameter_share(report: "Report") -> Figure:
    """Parameters by part for teacher and student: this profile's and the full-size pair of `base`."""
    made, axes = pyplot.subplots(1, 2, figsize=(12, 3.6))
    own = len(tokenizer_for(report.profile.run("student"), report.source))
    for axis, (profile, words) in zip(
        axes, ((report.profile, own), (load_profile("base"), BERT_VOCABULARY)), strict=True
    ):
        counts = pd.DataFrame({role: parts(build_meta(profile, role, words)) for role in ("teacher", "student")}).T
        left = np.zeros(len(counts))
        for place, part in enumerate(counts.columns):
            axis.barh(
                counts.index,
                counts[part],
                left=left,
                color=GREYS[place],
                hatch=HATCHES[place],
                edgecolor="black",
                linewidth=0.5,
                label=part.replace("_", " "),
            )
            left += counts[part].to_numpy()
        smaller = 100 * (1 - counts.loc["student"].sum() / counts.loc["teacher"].sum())
        axis.set(title=f"{profile.name}: student {smaller:.1f} % smaller", xlabel="parameters")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.invert_yaxis()
    axes[1].legend(fontsize=9, loc="lower right")
    made.tight_layout()
    return made


def build(report: "Report", role: str) -> VQAModel:
    """The profile's model for its data, untrained."""
    return Answers(report.profile.run(role).model_copy(update={"parent": None}), report.source, None).model


class _Words(list):
    """A tokenizer's length and nothing else: enough to size an embedding."""


def build_meta(profile: Profile, role: str, vocabulary: int = BERT_VOCABULARY) -> VQAModel:
    """The model of `role` in `profile` without memory for its weights, with easy-VQA's 13 answers: for counting."""
    run = profile.run(role)
    with torch.device("meta"):
        config = without_public_weights(run.model)
        return VQAModel(config, _Words([None] * vocabulary), [""] * 13, run.data.image_size)


def parts(model: VQAModel) -> dict[str, int]:
    """Parameters of each part."""
    names = ("image_encoder", "text_encoder", "fusion", "answer_head")
    return {name: parameter_count(getattr(model, name)) for name in names}


def draw_model(axis: Axes, model: VQAModel, title: str) -> None:
    """Boxes for the parts of `model`, each with its parameters and the shape it gives for one real-sized input."""
    size = model.image_size
    image = model.image_encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    ids = torch.ones(1, 12, dtype=torch.long)
    text = model.text_encoder(ids, ids)
    index = torch.zeros(1, dtype=torch.long)
    joint = model.fusion(image, text, ids, index, index)
    config, count = model.config, parts(model)

    def box(x: float, y: float, words: str, shade: str) -> None:
        axis.text(
            x,
            y,
            words,
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": shade, "edgecolor": "black"},
        )

    def arrow(start: tuple[float, float], end: tuple[float, float], words: str = "") -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "black"})
        axis.text(
            (start[0] + end[0]) / 2,
            (start[1] + end[1]) / 2,
            words,
            fontsize=8,
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )

    left, right, middle = 0.25, 0.75, 0.5
    box(left, 0.06, f"image (I, 3, {size}, {size})", "white")
    box(right, 0.06, "question (U, T)", "white")
    box(left, 0.36, f"{config.image_encoder.kind}\n{count['image_encoder']:,} parameters", "0.9")
    box(right, 0.36, f"{config.text_encoder.kind}\n{count['text_encoder']:,} parameters", "0.9")
    box(middle, 0.68, f"{config.fusion.kind.replace('_', ' ')} fusion\n{count['fusion']:,} parameters", "0.8")
    box(middle, 0.93, f"answer head (N, {len(model.answers)})\n{count['answer_head']:,} parameters", "white")
    arrow((left, 0.1), (left, 0.28))
    arrow((right, 0.1), (right, 0.28))
    arrow((left, 0.44), (middle - 0.06, 0.6), f"tokens (I, {image.tokens.shape[1]}, {image.tokens.shape[2]})")
    arrow((right, 0.44), (middle + 0.06, 0.6), f"tokens (U, T, {text.tokens.shape[2]})")
    arrow((middle, 0.76), (middle, 0.85), f"(N, {joint.shape[1]})")
    axis.set(title=f"{title}: {parameter_count(model):,} parameters", xlim=(0, 1), ylim=(0, 1))
    axis.set_axis_off()
