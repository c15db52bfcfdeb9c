"""The figures of 05_distillation. Their runs are students that started from untrained towers."""

import pandas as pd
import seaborn
from matplotlib import pyplot

from vqa.results import DISTORTIONS
from vqa.study.figures.style import figure, intervals, logarithmic, measured, records_of
from vqa.study.records import Report

REMOVED = {
    "without soft targets": {"alpha": 0.0},
    "without labels": {"alpha": 1.0},
    "without features": {"feature_weight": 0.0},
    "without tokens": {"token_weight": 0.0},
}
UNDERSTOOD = {
    "image_swap_changed": "image swapped: must change",
    "image_swap_kept": "image swapped: must stay",
    "question_swap_changed": "question swapped: must change",
    "question_swap_kept": "question swapped: must stay",
}


def students(report: Report) -> pd.DataFrame:
    """One row a student: its test accuracy as in results, fraction of questions, the terms' weights (NaN if alone).

    `arm` is alone, distilled, without one of the terms, or other.
    """
    rows = measured(report, "training").query("metric == 'accuracy' and split == 'test'").set_index("run")
    usual, model = report.profile.distillation.model_dump(), report.profile.models["student"].model_dump()
    arms = {"alone": {}, "distilled": usual} | {arm: usual | change for arm, change in REMOVED.items()}
    found = []
    for record in records_of(report, "training"):
        config = record.config
        if config["role"] == "student" and not config["parent"] and config["model"] == model:
            weights = config["distillation"] or {}
            arm = next((arm for arm, terms in arms.items() if terms == weights), "other")
            about = {"run": record.name, "fraction": config["data"]["question_fraction"], "arm": arm}
            found.append(rows.loc[record.name].to_dict() | weights | about)
    return pd.DataFrame(found)


def headline(report: Report) -> pd.DataFrame:
    """The students of the first fraction, where all arms are compared, by seed."""
    table = students(report).sort_values("seed")
    return table[table["fraction"] == report.profile.distillation_study.fractions[0]]


@figure
def distillation_terms(report: Report) -> None:
    """Test accuracy of the student alone, distilled, and distilled without each of the four terms, a mark a seed."""
    table = headline(report).set_index("arm")
    rows = pd.concat([table.loc[[arm]] for arm in ("alone", "distilled", *REMOVED)])
    _, axis = pyplot.subplots(figsize=(10, 3.8))
    intervals(axis, rows.reset_index(), "arm")
    axis.set(xlabel="how the student was trained, a mark a seed", ylabel="test accuracy, % [95 %]")


@figure
def distillation_curves(report: Report) -> None:
    """Validation accuracy over the steps of training, alone and distilled, first seed."""
    shown = ("alone", "distilled", "without features")
    arms = headline(report).query("arm in @shown").drop_duplicates("arm").set_index("run")["arm"]
    curves = [record.metrics.assign(arm=arms[record.name]) for record in report.records() if record.name in arms]
    curves = pd.concat(curves, ignore_index=True).dropna(subset="validation")
    _, axis = pyplot.subplots(figsize=(8, 3.8))
    look = {"hue": "arm", "style": "arm", "hue_order": shown, "style_order": shown, "markers": True}
    seaborn.lineplot(curves, x="step", y="validation", ax=axis, **look)
    axis.set(xlabel="optimizer step", ylabel="validation accuracy, %")
    axis.legend()


@figure
def distillation_sweep(report: Report) -> None:
    """Test accuracy against temperature, a panel for each weight of the soft targets."""
    table, usual = headline(report), report.profile.distillation
    features = (table["feature_weight"] == usual.feature_weight) & (table["token_weight"] == usual.token_weight)
    swept = table[features & table["alpha"].between(0, 1, inclusive="neither")]
    swept = swept.assign(student="distilled")
    alphas = sorted(swept["alpha"].unique())
    _, axes = pyplot.subplots(1, len(alphas), figsize=(3 + 2.6 * len(alphas), 3.4), sharey=True, squeeze=False)
    for axis, alpha in zip(axes[0], alphas, strict=True):
        intervals(axis, swept[swept["alpha"] == alpha], "temperature", "student")
        alone = table.loc[table["arm"] == "alone", "value"].mean()
        axis.axhline(alone, color="black", linestyle=":", label="alone")
        axis.set(xlabel="temperature", title=f"soft targets weigh {alpha:g}")
        logarithmic(axis, sorted(swept["temperature"].unique()))
    axes[0, 0].set(ylabel="test accuracy, % [95 %]")
    axes[0, -1].legend()


@figure
def sample_efficiency(report: Report) -> None:
    """Test accuracy of the student, alone and distilled, against the share of training questions it is given."""
    table = students(report).query("arm in ('alone', 'distilled')").sort_values(["arm", "fraction", "seed"])
    table["share"] = 100 * table["fraction"]
    apart = table["share"] * table["arm"].map({"alone": 0.985, "distilled": 1.015})  # else marks lie on each other
    _, axis = pyplot.subplots(figsize=(8, 4))
    intervals(axis, table.assign(at=apart), "at", "arm")
    look = {"hue": "arm", "style": "arm", "errorbar": None, "legend": False}
    seaborn.lineplot(table, x="share", y="value", ax=axis, **look)
    logarithmic(axis, sorted(table["share"].unique()))
    axis.set(xlabel="share of the training questions, %", ylabel="test accuracy, % [95 %]")
    axis.legend()


@figure
def understanding(report: Report) -> None:
    """Whether answers change when the image or the question is swapped, and stay when they must."""
    rows = measured(report, "understanding")
    rows = rows[rows["metric"].isin(UNDERSTOOD)]
    _, axis = pyplot.subplots(figsize=(11, 3.8))
    intervals(axis, rows.replace({"metric": UNDERSTOOD}), "metric", "model", bars=True, number="%.3g")
    axis.set(xlabel="", ylabel="share of swaps that do, % [95 %]", ylim=(0, 125), yticks=range(0, 101, 20))
    axis.legend(ncols=3, loc="upper center")


@figure
def robustness(report: Report) -> None:
    """Test accuracy under noise and blur of growing strength, teacher and both students."""
    rows = measured(report, "understanding").query("metric == 'accuracy'")
    rows = rows[rows["arm"].isin(DISTORTIONS)]
    rows = rows.assign(**pd.DataFrame(rows["arm"].map(DISTORTIONS).tolist(), rows.index, ["distortion", "strength"]))
    _, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    labels = {"noise": "noise, standard deviation of 255", "blur": "blur, standard deviation in pixels"}
    for axis, (distortion, label) in zip(axes, labels.items(), strict=True):
        intervals(axis, rows[rows["distortion"] == distortion], "strength", "model", joined=True)
        axis.set(xlabel=label)
    axes[0].set(ylabel="test accuracy, % [95 %]")
    axes[1].legend()
