"""The figure of 08_results, which 03_fusion shows as well."""

import pandas as pd
from matplotlib import pyplot

from vqa.results import accuracy_of
from vqa.study.figures.style import figure, intervals, legend_outside, run_label
from vqa.study.records import Report


@figure
def accuracy_by_type(report: Report) -> None:
    """Test accuracy by question type with 95 % intervals clustered by image, beside the blind baseline."""
    runs = report.answer_runs()
    rows = report.results().query("split == 'test'").set_index("run")
    rows = pd.concat([rows.loc[run.name].assign(label=run_label(report, run)) for run in runs])
    test = runs[0].predictions.query("split == 'test'")
    blind = 100 * test.groupby("question_type")["blind_correct"].mean()
    types = [name for name in report.source.question_types if name in blind.index]
    rows = pd.concat([rows[rows["metric"] == accuracy_of(name)].assign(question_type=name) for name in types])
    _, axis = pyplot.subplots(figsize=(10, 4))
    intervals(axis, rows, "question_type", "label")
    for place, name in enumerate(types):
        ends = (place - 0.35, place + 0.35)
        axis.hlines(blind[name], *ends, "black", ":", label=None if place else "image-blind")
    axis.set(xlabel="question type", ylabel="test accuracy, % [95 %]", ylim=(None, 102))
    legend_outside(axis)
