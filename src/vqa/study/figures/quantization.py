"""The figures of 06_quantization."""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure

from vqa.deployment.onnx_int8 import ENGINE
from vqa.deployment.pt2e import COMPILED, PT2E
from vqa.study.figures.style import GREYS, HATCHES, MARKERS, figure, logarithmic, show_image, test_image
from vqa.study.records import Record, Report

SHOWN = 8
BAR = 0.3  # points that quantization may lose
WORDS = {"eager": "PyTorch", COMPILED: "PyTorch compiled", PT2E: "PyTorch PT2E", ENGINE: ENGINE}


def rows_of(report: "Report", kind: str) -> pd.DataFrame:
    """The results of every benchmark of `kind`, a regular expression."""
    rows = report.results()
    return rows[rows["run"].str.contains(f"-{kind}-")]


def deployed(report: "Report", role: str) -> "Record":
    """The record of the deployment of `role`."""
    kept = [record for record in report.records() if record.config.get("kind") == "quantization"]
    return next(record for record in kept if record.config["run"]["role"] == role)


@figure
def accuracy_in_int8(report: "Report") -> Figure:
    """Test accuracy by question type, fp32 beside int8 on the same questions."""
    rows = rows_of(report, "quantization")
    rows = rows[rows["metric"].str.startswith("accuracy") & ~rows["metric"].str.contains("drop")]
    models = list(rows["model"].unique())
    made, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 3.8), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = rows[rows["model"] == model]
        kinds = own["metric"].unique()
        for place, (precision, bars) in enumerate(own.groupby("precision", sort=False)):
            error = [bars["value"] - bars["low"], bars["high"] - bars["value"]]
            axis.bar(np.arange(len(kinds)) + 0.4 * place, bars["value"], 0.4, yerr=error, color=GREYS[place + 1],
                     hatch=HATCHES[place], edgecolor="black", linewidth=0.5, capsize=3, label=precision)  # fmt: skip
        names = [kind.removeprefix("accuracy_").replace("_", "\n") for kind in kinds]
        axis.set_xticks(np.arange(len(kinds)) + 0.2, names, fontsize=9)
        axis.set(title=model, ylim=(max(own["low"].min() - 1, 0), min(own["high"].max() + 0.5, 100.5)))
        axis.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("test accuracy, % [95 %]")
    axes[0, -1].legend(fontsize=9, loc="lower right")
    made.tight_layout()
    return made


@figure
def layer_sensitivity(report: "Report") -> Figure:
    """How far each layer of the student moves the answers when it alone is int8, in the order of the graph."""
    rows = rows_of(report, "sensitivity")
    alone = rows[rows["precision"].str.startswith("int8 in ")]
    whole = rows[rows["precision"].str.startswith("int8, ")].iloc[-1]
    made, axis = pyplot.subplots(figsize=(9, 0.22 * len(alone) + 1))
    axis.barh(alone["precision"].str.removeprefix("int8 in "), alone["value"], color=GREYS[1])
    axis.axvline(whole["value"], color="black", linestyle="--", linewidth=1, label="all layers")
    axis.legend(fontsize=9, loc="lower right")
    axis.invert_yaxis()
    axis.tick_params("y", labelsize=8)
    axis.set(xscale="log", xlabel="divergence of the answers from fp32, nats")
    axis.grid(axis="y", visible=False)
    return made


@figure
def deployment_pareto(report: "Report") -> Figure:
    """Every trained model of this study as it can be served: accuracy against bytes and against latency."""
    rows = rows_of(report, "(?:quantization|cross_check)")
    served = rows.pivot_table(index=["model", "precision", "engine"], columns="metric", values="value", sort=False)
    trained = report.results().query(
        "metric in ('accuracy', 'bytes_on_disk') and engine == 'eager' and split != 'validation'"
    )
    made, axes = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True)
    for place, ((model, precision, engine), own) in enumerate(served.iterrows()):
        if np.isnan(own["accuracy"]):  # PyTorch answers as its own run recorded
            own = own.fillna(trained[trained["model"] == model].drop_duplicates("metric").set_index("metric")["value"])
        style = {"marker": MARKERS[place % 5], "s": 70, "color": f"C{place}", "edgecolor": "black", "alpha": 0.85}
        axes[0].scatter(own["bytes_on_disk"] / 1e6, own["accuracy"], **style)
        axes[1].scatter(own["latency_p50_ms"], own["accuracy"], label=f"{model}, {precision}, {WORDS[engine]}", **style)
    axes[0].set(xlabel="size on disk, MB", ylabel="test accuracy, %")
    axes[1].set(xlabel="latency of one question, p50, ms")
    for axis in axes:
        logarithmic(axis)
    axes[1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    made.tight_layout()
    return made


@figure
def deployment_latency(report: "Report") -> Figure:
    """Latency of one question with random weights: models and engines in turn on the same threads."""
    rows = rows_of(report, "latency(?:_compiled)?").query("metric in ('latency_p50_ms', 'latency_p95_ms')")
    model = rows["model"].str.removesuffix(", random weights")
    engine = rows["engine"].replace(WORDS, regex=True)
    rows = rows.assign(arm=model + ", " + rows["precision"] + ", " + engine)
    p50, p95 = (rows[rows["metric"] == f"latency_{name}_ms"].set_index("arm") for name in ("p50", "p95"))
    made, axis = pyplot.subplots(figsize=(9, 0.36 * len(p50) + 1))
    error = [p50["value"] - p50["low"], p50["high"] - p50["value"]]
    axis.barh(p50.index, p50["value"], xerr=error, color=GREYS[2], edgecolor="black", capsize=3, label="median [95 %]")
    axis.scatter(p95["value"], p95.index, marker="|", s=120, color="black", label="95th percentile", zorder=3)
    for name, value in p50["value"].items():
        axis.text(0.01, name, f"{value:.3g}", transform=axis.get_yaxis_transform(), fontsize=8, va="center")
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds")
    logarithmic(axis)
    axis.grid(axis="y", visible=False)
    axis.legend(fontsize=9, loc="lower right")
    return made


@figure
def fewer_bits(report: "Report") -> Figure:
    """What the student loses to fp32 with coarser weights, rounded after training and fine-tuned, by ranks."""
    rows = rows_of(report, "qat").query("metric == 'accuracy_drop' and precision != 'fp32'")
    made, axis = pyplot.subplots(figsize=(9, 3.6))
    for place, (ranks, own) in enumerate(rows.groupby("world_size")):
        error = [own["value"] - own["low"], own["high"] - own["value"]]
        axis.bar(np.arange(len(own)) + 0.4 * place, own["value"], 0.4, yerr=error, color=GREYS[place + 1],
                 hatch=HATCHES[place], edgecolor="black", linewidth=0.5, capsize=3,
                 label=f"{ranks} rank{'s' * (ranks > 1)}")  # fmt: skip
    axis.axhline(BAR, color="black", linestyle="--", linewidth=1, label=f"{BAR} points")
    axis.set_xticks(np.arange(len(own)) + 0.2, own["precision"])
    axis.set_ylabel("accuracy lost, points [95 %]")
    axis.grid(axis="x", visible=False)
    axis.legend(fontsize=9)
    return made


@figure
def flipped_answers(report: "Report") -> Figure:
    """Test questions that int8 answers otherwise than fp32; filled up with those whose confidence moved most."""
    answered = deployed(report, "student").predictions
    moved = (answered["confidence"] - answered["fp32_confidence"]).abs()
    flipped = answered["prediction"] != answered["fp32_prediction"]
    ranked = answered.assign(flipped=flipped, moved=moved).sort_values(["flipped", "moved"], ascending=False)
    made, axes = pyplot.subplots(2, SHOWN // 2, figsize=(12, 7))
    for axis, item in zip(axes.flat, ranked.head(SHOWN).itertuples(), strict=True):
        show_image(axis, test_image(report, item.image_id))
        before = f"fp32 {item.fp32_prediction} {100 * item.fp32_confidence:.1f} %"
        after = f"int8 {item.prediction} {100 * item.confidence:.1f} %"
        words = f"{item.question}\n{before}, {after}\n(is {item.answer})"
        axis.set_title(words, fontsize=8, fontweight="bold" if item.flipped else "normal")
    made.tight_layout()
    return made
