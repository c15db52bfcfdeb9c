"""The study's figures. Each takes the Report it is drawn from and gives a matplotlib Figure.

Runs differ by line style and marker, bars by hatching, so that every figure reads in grey.
"""

import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from vqa.data.source import pairs
from vqa.study.figures.style import MARKERS, SHOWN_ANSWERS, answered, bars, figure, run_label, show_image, test_image
from vqa.study.records import Report


@figure
def learning_curves(report: "Report") -> Figure:
    """Training loss and validation accuracy of every run that answers questions."""
    made, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4))
    blind = 0.0
    for place, record in enumerate(report.answer_runs()):
        metrics = record.metrics
        style = {"marker": MARKERS[place % 5], "color": f"C{place}", "markersize": 5, "label": run_label(record)}
        loss, judged = metrics.dropna(subset="loss"), metrics.dropna(subset="validation")
        left.plot(loss["step"], loss["loss"], linestyle=("-", "--", ":", "-.")[place % 4], **style)
        right.plot(judged["step"], judged["validation"], linestyle=("-", "--", ":", "-.")[place % 4], **style)
        held = record.predictions.query("split == 'validation'")
        blind = 100 * held["blind_correct"].mean()
    right.axhline(blind, color="black", linewidth=1, linestyle=(0, (1, 1)))
    right.annotate("image-blind", (0, blind), xytext=(3, 3), textcoords="offset points", fontsize=9)
    left.set(xlabel="optimizer step", ylabel="cross-entropy, nats", yscale="log", title="training loss")
    right.set(xlabel="optimizer step", ylabel="accuracy, %", title="validation (images held out of training)")
    left.yaxis.set_minor_formatter(NullFormatter())
    right.legend(fontsize=9, bbox_to_anchor=(1.02, 1), loc="upper left")
    made.tight_layout()
    return made


@figure
def alignment_curves(report: "Report") -> Figure:
    """R-precision on held-out images while the towers are aligned with captions."""
    made, axis = pyplot.subplots(figsize=(7, 3.8))
    aligned = [record for record in report.records() if record.config.get("objective") == "alignment"]
    for place, record in enumerate(aligned):
        judged = record.metrics.dropna(subset="validation")
        axis.plot(
            judged["epoch"],
            judged["validation"],
            marker=MARKERS[place],
            linestyle=("-", "--")[place % 2],
            label=f"{record.config['role']} towers",
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel="R-precision, mean of both ways, %", ylim=(0, 103))
    axis.legend(fontsize=9)
    return made


@figure
def confusion(report: "Report") -> Figure:
    """What each model answers where it should have said something else, by question type; the commonest answers."""
    records = report.first_seeds()
    made, axes = pyplot.subplots(1, len(records), figsize=(6.2 * len(records), 5.4), squeeze=False)
    kinds = pairs(report.source.splits["train"]).groupby("answer")["question_type"].min()
    often = pairs(report.source.splits["test"])["answer"].value_counts().index.intersection(kinds.index, sort=False)
    order = sorted(often[:SHOWN_ANSWERS], key=lambda answer: (kinds[answer], answer))
    for axis, record in zip(axes[0], records, strict=True):
        test = record.predictions.query("split == 'test'")
        counts = pd.crosstab(test["answer"], test["prediction"]).reindex(index=order, columns=order, fill_value=0)
        share = 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        seaborn.heatmap(
            share,
            ax=axis,
            cmap="Greys",
            vmin=0,
            vmax=100,
            annot=share.round(0).astype(int),
            fmt="d",
            annot_kws={"size": 7},
            cbar=False,
            linewidths=0.3,
        )
        axis.set(title=f"{run_label(record)}: % of each true answer", xlabel="model's answer", ylabel="true answer")
    made.tight_layout()
    return made


@figure
def right_and_wrong(report: "Report") -> Figure:
    """Per run: the surest right answers and the surest wrong ones, on test images."""
    records = report.first_seeds()
    made, axes = pyplot.subplots(len(records), 8, figsize=(14, 2.5 * len(records)), squeeze=False)
    for row, record in zip(axes, records, strict=True):
        test = record.predictions.query("split == 'test'").sort_values("confidence", ascending=False)
        chosen = [test[test["correct"] == 1].drop_duplicates("question_type").head(4)]
        chosen.append(test[test["correct"] == 0].drop_duplicates("image_id").head(4))
        for axis, block in zip((row[:4], row[4:]), chosen, strict=True):
            for place, cell in enumerate(axis):
                if place >= len(block):
                    cell.set_axis_off()
                    continue
                item = block.iloc[place]
                show_image(cell, test_image(report, item["image_id"]))
                cell.set_title(answered(item), fontsize=7)
        row[0].set_ylabel(run_label(record), fontsize=9)
    made.tight_layout()
    return made


@figure
def accuracy_by_type(report: "Report") -> Figure:
    """Test accuracy by question type with 95 % intervals clustered by image, beside the blind baseline."""
    results = report.results()
    rows = results[(results["split"] == "test") & (results["engine"] == "eager")]
    rows = rows[rows["metric"].str.startswith("accuracy_")]
    rows = rows[~rows["metric"].isin(["accuracy_blind", "accuracy_minus_blind", "accuracy_written"])]
    records = report.answer_runs()
    rows = rows[rows["run"].isin([record.name for record in records])]
    kinds = sorted(rows["metric"].unique())
    made, axis = pyplot.subplots(figsize=(10, 4))
    for place, record in enumerate(records):
        own = rows[rows["run"] == record.name].set_index("metric").loc[kinds]
        at = np.arange(len(kinds)) + (place - (len(records) - 1) / 2) * min(0.15, 0.8 / len(records))
        error = [own["value"] - own["low"], own["high"] - own["value"]]
        axis.errorbar(
            at, own["value"], error, fmt=MARKERS[place % 5], capsize=2, color=f"C{place}", label=run_label(record)
        )
    if records:
        test = records[0].predictions.query("split == 'test'")
        blind = 100 * test.groupby("question_type")["blind_correct"].mean()
        for place, kind in enumerate(kinds):
            level = blind[kind.removeprefix("accuracy_")]
            axis.hlines(
                level, place - 0.35, place + 0.35, color="black", linestyle=":", label=None if place else "image-blind"
            )
    axis.set_xticks(range(len(kinds)), [kind.removeprefix("accuracy_").replace("_", "\n") for kind in kinds])
    axis.set(xlabel="question type", ylabel="test accuracy, %", ylim=(None, 101))
    axis.legend(fontsize=9, bbox_to_anchor=(1.02, 1), loc="upper left")
    return made


@figure
def precision_costs(report: "Report") -> Figure:
    """Step time and peak memory of fp32 and bf16, with and without gradient checkpointing."""
    rows = report.results()
    rows = rows[rows["metric"].isin(["step_seconds", "peak_memory_bytes"]) & rows["run"].str.contains("precision")]
    rows = rows.assign(arm=rows["precision"] + rows["engine"].str.removeprefix("eager").str.replace(", ", "\n"))
    made, axes = pyplot.subplots(1, 2, figsize=(11, 3.6))
    for axis, metric, unit, scale in zip(
        axes,
        ("step_seconds", "peak_memory_bytes"),
        ("step, ms", "peak memory of a step, MiB"),
        (1e3, 2**-20),
        strict=True,
    ):
        own = rows[rows["metric"] == metric].set_index("arm")[["value"]] * scale
        bars(axis, own, labels=True)
        axis.set(xlabel="", ylabel=unit)
        axis.get_legend().remove()
    made.tight_layout()
    return made


@figure
def step_breakdown(report: "Report") -> Figure:
    """Where a training step's time goes, by torch.profiler."""
    rows = report.results()
    rows = rows[rows["metric"].str.startswith("seconds_")]
    rows = rows.assign(part=rows["metric"].str.removeprefix("seconds_").str.replace("_", " "))
    table = rows.pivot_table(index="part", columns="model", values="value", sort=False) * 1e3
    made, axis = pyplot.subplots(figsize=(9, 3.6))
    bars(axis, table, labels=True)
    axis.set(xlabel="", ylabel="time per step, ms")
    axis.tick_params("x", rotation=20)
    return made
