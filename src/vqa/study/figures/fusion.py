"""The figures of 03_fusion."""

import numpy as np
from matplotlib import pyplot

from vqa.study.figures.images import judged_answer, show_image, test_image
from vqa.study.figures.style import figure, intervals, logarithmic, measured, records_of, words
from vqa.study.records import Report

COSTS = ["flops_per_question", "training_questions_per_second"]


@figure
def fusion_costs(report: Report) -> None:
    """Accuracy of each fusion against what a question costs it, in operations and in time."""
    costs = measured(report, "costs").query("model == 'teacher'")
    costs = costs.pivot_table(index="fusion", columns="metric", values="value")[COSTS]
    costs["flops_per_question"] /= 1e6
    accuracy = measured(report, "training").query("metric == 'accuracy' and split == 'test' and model == 'teacher'")
    rows = accuracy[accuracy["arm"] == ""].join(costs, on="fusion", how="inner")
    rows["fusion"] = rows["fusion"].map(words)
    _, axes = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True)
    for axis, metric in zip(axes, COSTS, strict=True):
        intervals(axis, rows, metric, "fusion")
        logarithmic(axis)
    axes[0].set(xlabel="operations per question, MFLOP", ylabel="test accuracy, % [95 %]")
    axes[1].set(xlabel="training speed, questions/s")
    axes[1].legend()


@figure
def full_size_memory(report: Report) -> None:
    """Peak memory of one full-size training step on one image, concat beside cross attention."""
    rows = measured(report, "full_size")
    rows["fusion"] = rows["fusion"].map(words)
    _, axis = pyplot.subplots(figsize=(9, 3.8))
    intervals(axis, rows, "variant", "fusion", bars=True, number="%.3g", scale=2**-30)
    axis.set(xlabel="precision of the step", ylabel="peak memory of a step, GiB")
    axis.legend()


@figure
def attention_maps(report: Report) -> None:
    """Where a cross-attention model looks: the mean over heads and question tokens, wrong answers first."""
    (record,) = records_of(report, "attention")
    looked = next(run for run in report.first_seeds() if run.config["model"]["fusion"]["kind"] == "cross_attention")
    test = looked.predictions.query("split == 'test'").set_index("question_id")
    maps = np.load(record.folder / "attention.npz")
    count = len(maps["question_id"])
    _, axes = pyplot.subplots(2, count, figsize=(1.9 * count, 5), squeeze=False)
    for (above, below), asked, seen, tokens in zip(axes.T, *maps.values(), strict=True):
        item = test.loc[asked]
        image = test_image(report, item["image_id"])
        side = int(np.sqrt(seen.shape[1]))  # a [CLS] token, where there is one, comes first
        over_image = seen[tokens != ""].mean(0)[-side * side :].reshape(side, side)
        for axis in (above, below):
            show_image(axis, image)
        above.set_title(judged_answer(item), fontsize=7)
        whole = (0, image.shape[2], image.shape[1], 0)
        below.imshow(over_image, cmap="Greys_r", alpha=0.75, extent=whole, interpolation="nearest")
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("attention (light = looked at)", fontsize=9)
