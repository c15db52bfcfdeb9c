"""The figures of 01_architecture, and the models they count. Only its functions import what models need."""

from types import SimpleNamespace

import pandas as pd
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter

from vqa.config import Profile, load_profile
from vqa.study.figures.style import GREYS, HATCHES, figure, words
from vqa.study.records import Report

BERT_VOCABULARY = 30522
ROLES = ("teacher", "student")


@figure
def towers(report: Report) -> None:
    """Both models of the profile, part by part, with the shapes that flow through them, measured by running them."""
    made, axes = pyplot.subplots(2, 1, figsize=(8, 4.4))
    for axis, role in zip(axes, ROLES, strict=True):
        model = build(report, role)
        kinds = {name: getattr(model.config, name).kind for name in ("image_encoder", "text_encoder", "fusion")}
        rows = [
            [words(part), words(kinds.get(part, "linear")), f"{count:,}", shape]
            for (part, count), shape in zip(parts(model).items(), shapes(model), strict=True)
        ]
        table = axis.table(rows, colLabels=["part", "kind", "parameters", "gives"], loc="center", cellLoc="center")
        table.scale(1, 1.5)
        axis.set(title=f"{role}: {sum(parts(model).values()):,} parameters")
        axis.set_axis_off()
    made.supxlabel("I images · U questions of T tokens · N pairs of an image and a question", fontsize=9)


@figure
def parameter_share(report: Report) -> None:
    """Parameters by part for teacher and student: this profile's and the full-size pair of `base`."""
    vocabulary_size = build(report, "student").processor.vocabulary_size
    shown = ((report.profile, vocabulary_size), (load_profile("base"), BERT_VOCABULARY))
    _, axes = pyplot.subplots(1, 2, figsize=(12, 3.6))
    for axis, (profile, vocabulary) in zip(axes, shown, strict=True):
        counts = pd.DataFrame({role: parts(build_meta(profile, role, vocabulary)) for role in ROLES}).T
        smaller = 100 * (1 - counts.loc["student"].sum() / counts.loc["teacher"].sum())
        counts.rename(columns=words).plot.barh(stacked=True, ax=axis, color=GREYS, edgecolor="black", legend=False)
        for bars, hatch in zip(axis.containers, HATCHES, strict=True):
            pyplot.setp(bars, hatch=hatch, linewidth=0.5)
        axis.set(title=f"{profile.name}: student {smaller:.1f} % smaller", xlabel="parameters")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
    axes[1].legend(loc="lower right")


def build(report: Report, role: str):
    """The profile's VQAModel for its data, untrained."""
    from vqa.models.build import vqa_model
    from vqa.training.objectives import processor_for

    run = report.profile.run(role)
    return vqa_model(run.model, processor_for(run, report.source))


def build_meta(profile: Profile, role: str, vocabulary: int = BERT_VOCABULARY):
    """The VQAModel of `role` without memory for its weights, with easy-VQA's 13 answers: for counting."""
    import torch

    from vqa.models.build import vqa_model
    from vqa.models.parts import without_public_weights

    run = profile.run(role)
    with torch.device("meta"):
        sizes = SimpleNamespace(vocabulary_size=vocabulary, answers=[""] * 13, image_size=run.data.image_size)
        return vqa_model(without_public_weights(run.model), sizes)


def parts(model) -> dict[str, int]:
    """Parameters of each part of a VQAModel."""
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.named_children()}


def shapes(model) -> list[str]:
    """What each part of a VQAModel gives for an image and a question of 12 tokens, as (batch, …, width)."""
    import torch

    size = model.processor.image_size
    ids, first = torch.ones(1, 12, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    image, text = model.image_encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8)), model.text_encoder(ids, ids)
    joint = model.fusion(image, text, ids, first, first)
    (_, seen, wide), (_, _, deep) = image.tokens.shape, text.tokens.shape
    return [f"(I, {seen}, {wide})", f"(U, T, {deep})", f"(N, {joint.shape[1]})", f"(N, {len(model.processor.answers)})"]
