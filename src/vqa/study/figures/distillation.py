"""The figures of 05_distillation. Their runs are students that started from untrained towers."""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from vqa.study.figures.style import MARKERS, bars, figure
from vqa.study.records import Report

LINES = ("-", "--", ":", "-.")
TERMS = ["temperature", "alpha", "feature_weight", "token_weight"]
REMOVED = {
    "without soft targets": {"alpha": 0.0},
    "without labels": {"alpha": 1.0},
    "without features": {"feature_weight": 0.0},
    "without tokens": {"token_weight": 0.0},
}
UNDERSTOOD = {
    "image_swap_changed": "image swapped:\nchanges when it must",
    "image_swap_kept": "image swapped:\nstays when it must",
    "question_swap_changed": "question swapped:\nchanges when it must",
    "question_swap_kept": "question swapped:\nstays when it must",
}


def students(report: "Report") -> pd.DataFrame:
    """One row a student of the study: fraction, seed, the terms' weights (missing if alone), accuracy, way, record.

    `way` is alone, distilled, without one of the terms, or other.
    """
    rows = []
    for record in report.records():
        if not record.answers() or record.config["role"] != "student" or record.config["parent"]:
            continue
        if record.config["model"] != report.profile.models["student"].model_dump():
            continue
        right = next(
            row for row in record.rows(report.profile) if (row["metric"], row["split"]) == ("accuracy", "test")
        )
        taught = record.config["distillation"] or dict.fromkeys(TERMS, np.nan)
        kept = {key: right[key] for key in ("value", "low", "high", "seed")}
        fraction = record.config["data"]["question_fraction"]
        rows.append({"fraction": fraction, **taught, **kept, "way": _way(report, taught), "record": record})
    return pd.DataFrame(rows)


def _way(report: "Report", taught: dict[str, float]) -> str:
    usual = report.profile.distillation.model_dump()
    ways = {
        "alone": dict.fromkeys(TERMS, np.nan),
        "distilled": usual,
        **{way: usual | change for way, change in REMOVED.items()},
    }
    return next((way for way, terms in ways.items() if _same(terms, taught)), "other")


def _same(first: dict[str, float], second: dict[str, float]) -> bool:
    return np.array_equal([first[term] for term in TERMS], [second[term] for term in TERMS], equal_nan=True)


def headline(report: "Report") -> pd.DataFrame:
    """The students of the first fraction, where all ways are compared."""
    table = students(report)
    return table[table["fraction"] == report.profile.distillation_study.fractions[0]]


@figure
def distillation_terms(report: "Report") -> Figure:
    """Test accuracy of the student alone, distilled, and distilled without each of the four terms, a mark a seed."""
    table = headline(report)
    ways = ["alone", "distilled", *REMOVED]
    made, axis = pyplot.subplots(figsize=(10, 3.8))
    for place, way in enumerate(ways):
        own = table[table["way"] == way]
        at = place + np.linspace(-0.1, 0.1, len(own)) if len(own) > 1 else [place]
        _marks(axis, at, own, place, way)
    axis.set_xticks(range(len(ways)), ways)
    axis.set(ylabel="test accuracy, % [95 %]", xlabel="")
    return made


@figure
def distillation_curves(report: "Report") -> Figure:
    """Validation accuracy over the steps of training, alone and distilled, first seed."""
    table = headline(report)
    made, axis = pyplot.subplots(figsize=(8, 3.8))
    for place, way in enumerate(("alone", "distilled", "without features")):
        record = table[table["way"] == way].sort_values("seed")["record"].iloc[0]
        judged = record.metrics.dropna(subset="validation")
        axis.plot(
            judged["step"], judged["validation"], LINES[place], marker=MARKERS[place], color=f"C{place}", label=way
        )
    axis.set(xlabel="optimizer step", ylabel="validation accuracy, %")
    axis.legend(fontsize=9)
    return made


@figure
def distillation_sweep(report: "Report") -> Figure:
    """Test accuracy against temperature, a panel for each weight of the soft targets."""
    table = headline(report)
    usual = report.profile.distillation
    features = (table["feature_weight"] == usual.feature_weight) & (table["token_weight"] == usual.token_weight)
    swept = table[features & table["alpha"].between(0, 1, inclusive="neither")]
    alphas = sorted(swept["alpha"].unique())
    made, axes = pyplot.subplots(1, len(alphas), figsize=(3 + 2.6 * len(alphas), 3.4), sharey=True, squeeze=False)
    alone = table.loc[table["way"] == "alone", "value"].mean()
    for axis, alpha in zip(axes[0], alphas, strict=True):
        own = swept[swept["alpha"] == alpha].sort_values("temperature")
        _marks(axis, own["temperature"], own, 1, "distilled")
        axis.axhline(alone, color="black", linestyle=":", label="alone")
        axis.set(xscale="log", xlabel="temperature", title=f"soft targets weigh {alpha:g}")
        axis.set_xticks(sorted(swept["temperature"].unique()))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set(ylabel="test accuracy, % [95 %]")
    axes[0, -1].legend(fontsize=9)
    made.tight_layout()
    return made


@figure
def sample_efficiency(report: "Report") -> Figure:
    """Test accuracy of the student, alone and distilled, against the share of training questions it is given."""
    table = students(report)
    made, axis = pyplot.subplots(figsize=(8, 4))
    for place, way in enumerate(("alone", "distilled")):
        own = table[table["way"] == way].sort_values(["fraction", "seed"])
        _marks(axis, 100 * own["fraction"] * (1 + 0.03 * place), own, place, way)
        mean = own.groupby("fraction")["value"].mean()
        axis.plot(100 * mean.index, mean, LINES[place], color=f"C{place}")
    axis.set(xscale="log", xlabel="share of the training questions, %", ylabel="test accuracy, % [95 %]")
    axis.set_xticks([100 * fraction for fraction in sorted(table["fraction"].unique())])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=9)
    return made


@figure
def understanding(report: "Report") -> Figure:
    """Whether answers change when the image or the question is swapped, and stay when they must."""
    rows = _compared(report)
    table = rows[rows["metric"].isin(UNDERSTOOD)].pivot_table(
        index="metric", columns="model", values="value", sort=False
    )
    made, axis = pyplot.subplots(figsize=(11, 3.8))
    bars(axis, table.rename(index=UNDERSTOOD), labels=True)
    axis.set(xlabel="", ylabel="share of swaps, %", ylim=(0, 118))
    axis.legend(fontsize=9, ncols=3, loc="upper center")
    return made


@figure
def robustness(report: "Report") -> Figure:
    """Test accuracy under noise and blur of growing strength, teacher and both students."""
    rows = _compared(report)
    named = rows["metric"].str.extract(r"accuracy_(noisy|blurred)_(\d+)")
    rows = rows.assign(kind=named[0], level=named[1].astype(float)).dropna(subset="kind")
    made, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    words = ("noise, standard deviation of 255", "blur, standard deviation in pixels")
    for axis, kind, said in zip(axes, ("noisy", "blurred"), words, strict=True):
        for place, (model, own) in enumerate(rows[rows["kind"] == kind].groupby("model", sort=False)):
            _marks(axis, own["level"], own, place, model)
            axis.plot(own["level"], own["value"], LINES[place], color=f"C{place}")
        axis.set(xlabel=said)
    axes[0].set(ylabel="test accuracy, % [95 %]")
    axes[1].legend(fontsize=9)
    made.tight_layout()
    return made


def _compared(report: "Report") -> pd.DataFrame:
    rows = report.results()
    return rows[rows["run"].str.contains("-understanding-")]


def _marks(axis: Axes, at: object, rows: pd.DataFrame, place: int, label: str) -> None:
    error = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
    axis.errorbar(at, rows["value"], error, fmt=MARKERS[place], capsize=3, color=f"C{place}", label=label)
