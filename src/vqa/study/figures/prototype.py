"""The figures of 02_prototype; 03_fusion shows its learning curves as well."""

import pandas as pd
import seaborn
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator, NullFormatter

from vqa.study.figures.images import judged_answer, show_image, test_image
from vqa.study.figures.style import SHOWN_ANSWERS, figure, intervals, legend_outside, measured, records_of, run_label
from vqa.study.records import Report


@figure
def learning_curves(report: Report) -> None:
    """Training loss and validation accuracy of every run that answers questions."""
    runs = report.answer_runs()
    curves = [run.metrics.assign(run=run_label(report, run), name=run.name) for run in runs]
    curves = pd.concat(curves, ignore_index=True)
    _, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4))
    look = {"hue": "run", "style": "run", "markers": True, "markersize": 5, "units": "name", "estimator": None}
    seaborn.lineplot(curves.dropna(subset="loss"), x="step", y="loss", ax=left, legend=False, **look)
    seaborn.lineplot(curves.dropna(subset="validation"), x="step", y="validation", ax=right, **look)
    blind = 100 * runs[-1].predictions.query("split == 'validation'")["blind_correct"].mean()
    right.axhline(blind, color="black", linewidth=1, linestyle=":", label="image-blind")
    left.set(xlabel="optimizer step", ylabel="cross-entropy, nats", yscale="log", title="training loss")
    left.yaxis.set_minor_formatter(NullFormatter())
    right.set(xlabel="optimizer step", ylabel="accuracy, %", title="validation (images held out of training)")
    legend_outside(right)


@figure
def alignment_curves(report: Report) -> None:
    """R-precision on held-out images while the towers are aligned with captions."""
    curves = [run.metrics.assign(towers=run.model) for run in records_of(report, "alignment")]
    curves = pd.concat(curves, ignore_index=True).dropna(subset="validation")
    _, axis = pyplot.subplots(figsize=(7, 3.8))
    seaborn.lineplot(curves, x="epoch", y="validation", hue="towers", style="towers", markers=True, ax=axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel="R-precision, mean of both ways, %", ylim=(0, 103))


@figure
def confusion(report: Report) -> None:
    """What each model answers where it should have said something else, by question type; the commonest answers."""
    runs = report.first_seeds()
    _, axes = pyplot.subplots(1, len(runs), figsize=(6.2 * len(runs), 5.4), squeeze=False)
    train, test = (report.source.splits[name].questions for name in ("train", "test"))
    types = train.groupby("answer")["question_type"].min()
    often = test["answer"].value_counts().index.intersection(types.index, sort=False)
    order = sorted(often[:SHOWN_ANSWERS], key=lambda answer: (types[answer], answer))
    for axis, run in zip(axes[0], runs, strict=True):
        answered = run.predictions.query("split == 'test'")
        share = pd.crosstab(answered["answer"], answered["prediction"], normalize="index").mul(100)
        share = share.reindex(index=order, columns=order, fill_value=0)
        look = {"cmap": "Greys", "vmin": 0, "vmax": 100, "cbar": False, "linewidths": 0.3}
        seaborn.heatmap(share, ax=axis, annot=True, fmt=".0f", annot_kws={"size": 7}, **look)
        title = f"{run_label(report, run)}:\n% of each true answer"
        axis.set(title=title, xlabel="model's answer", ylabel="true answer")


@figure
def right_and_wrong(report: Report) -> None:
    """Per run: the surest right answers and the surest wrong ones, on test images."""
    runs = report.first_seeds()
    _, axes = pyplot.subplots(len(runs), 8, figsize=(14, 2.5 * len(runs)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, run in zip(axes, runs, strict=True):
        test = run.predictions.query("split == 'test'").sort_values("confidence", ascending=False)
        right = test[test["correct"] == 1].drop_duplicates("question_type").head(4)
        wrong = test[test["correct"] == 0].drop_duplicates("image_id").head(4)
        row[0].set_ylabel(run_label(report, run), fontsize=9)
        for cells, items in ((row[:4], right), (row[4:], wrong)):
            for axis, (_, item) in zip(cells, items.iterrows()):  # noqa: B905  there may be fewer than four
                axis.axis("on")
                show_image(axis, test_image(report, item["image_id"]))
                axis.set_title(judged_answer(item), fontsize=7)


@figure
def precision_costs(report: Report) -> None:
    """Step time and peak memory of fp32 and bf16, with and without gradient checkpointing."""
    rows = measured(report, "precision")
    _, axes = pyplot.subplots(1, 2, figsize=(11, 3.6))
    costs = (("step_seconds", "step, ms", 1e3), ("peak_memory_bytes", "peak memory of a step, MiB", 2**-20))
    for axis, (metric, label, scale) in zip(axes, costs, strict=True):
        own = rows[rows["metric"] == metric]
        intervals(axis, own, "variant", bars=True, number="%.3g", scale=scale)
        axis.set(xlabel="precision of the step", ylabel=label)


@figure
def step_breakdown(report: Report) -> None:
    """Where a training step's time goes, by torch.profiler."""
    _, axis = pyplot.subplots(figsize=(9, 3.6))
    intervals(axis, measured(report, "breakdown"), "arm", "model", bars=True, number="%.3g", scale=1e3)
    axis.set(xlabel="part of the step", ylabel="time per step, ms")
    axis.legend()
