"""The study's figures. Each takes the Report it is drawn from and gives a matplotlib Figure.

Runs differ by line style and marker, bars by hatching, so that every figure reads in grey.
"""

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from vqa.study.figures.style import MARKERS, answered, bars, figure, logarithmic, show_image, test_image
from vqa.study.records import Report


@figure
def fusion_costs(report: "Report") -> Figure:
    """Accuracy of each fusion against what a question costs it, in operations and in time."""
    results = report.results()
    costs = results[results["run"].str.contains("-costs-")]
    accuracy = results.query("metric == 'accuracy' and split == 'test' and model == 'teacher' and engine == 'eager'")
    made, axes = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True)
    for axis, metric, words, scale in zip(
        axes,
        ("flops_per_question", "training_questions_per_second"),
        ("operations per question, MFLOP", "training speed, questions/s"),
        (1e-6, 1),
        strict=True,
    ):
        for place, (fusion, own) in enumerate(accuracy.groupby("fusion", sort=False)):
            cost = costs[(costs["metric"] == metric) & (costs["fusion"] == fusion)]["value"]
            if cost.empty:
                continue
            error = [own["value"] - own["low"], own["high"] - own["value"]]
            axis.errorbar([cost.iloc[0] * scale] * len(own), own["value"], error, fmt=MARKERS[place], capsize=3,
                          color=f"C{place}", label=fusion.replace("_", " "))  # fmt: skip
        axis.set(xlabel=words)
        logarithmic(axis)
    axes[0].set(ylabel="test accuracy, % [95 %]")
    axes[1].legend(fontsize=9)
    made.tight_layout()
    return made


@figure
def full_size_memory(report: "Report") -> Figure:
    """Peak memory of one full-size training step on one image, concat beside cross attention."""
    rows = report.results()
    rows = rows[rows["run"].str.contains("-full_size-")]
    rows = rows.assign(arm=rows["precision"] + rows["engine"].str.removeprefix("eager").str.replace(", ", "\n"))
    table = rows.pivot_table(index="arm", columns="fusion", values="value", sort=False) * 2**-30
    made, axis = pyplot.subplots(figsize=(9, 3.8))
    bars(axis, table, labels=True)
    axis.set(xlabel="", ylabel="peak memory of a step, GiB")
    return made


@figure
def attention_maps(report: "Report") -> Figure:
    """Where a cross-attention model looks: the mean over heads and question tokens, wrong answers first."""
    (record,) = [record for record in report.records() if (record.folder / "attention.npz").is_file()]
    kept = np.load(record.folder / "attention.npz")
    looked = next(r for r in report.first_seeds() if r.config["model"]["fusion"]["kind"] == "cross_attention")
    test = looked.predictions.query("split == 'test'").set_index("question_id")
    count = len(kept["question_id"])
    made, axes = pyplot.subplots(2, count, figsize=(1.9 * count, 5), squeeze=False)
    for place, (asked, seen, words) in enumerate(zip(*kept.values(), strict=True)):
        item = test.loc[asked]
        image = test_image(report, item["image_id"])
        side = int(np.sqrt(seen.shape[1]))  # a [CLS] token, where there is one, comes first
        over_image = seen[words != ""].mean(0)[-side * side :].reshape(side, side)
        show_image(axes[0, place], image)
        axes[0, place].set_title(answered(item), fontsize=7)
        show_image(axes[1, place], image)
        whole = (0, image.shape[2], image.shape[1], 0)
        axes[1, place].imshow(over_image, cmap="Greys_r", alpha=0.75, extent=whole, interpolation="nearest")
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("attention (light = looked at)", fontsize=9)
    made.tight_layout()
    return made
