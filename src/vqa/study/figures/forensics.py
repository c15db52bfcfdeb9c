"""The figures of 07_forensics."""

import numpy as np
import pandas as pd
from matplotlib import pyplot

from vqa.experiments import earlier_study
from vqa.results import EARLIER, EARLIER_RECIPE, SOUND
from vqa.study.figures.style import figure, intervals, measured, ranks_label, records_of
from vqa.study.records import Report


def last_batches(report: Report, fault: str) -> dict[int, np.ndarray]:
    """Rank 0's own loss in every step of the last epoch under `fault`, all seeds, by number of ranks."""
    steps = pd.concat([record.metrics for record in records_of(report, "forensics")])
    return earlier_study.last_batches(steps, fault)


@figure
def fault_effects(report: Report) -> None:
    """What each fault has the log report, and what was learned by one yardstick, on 1, 2 and 4 ranks."""
    rows = measured(report, "forensics")
    _, axes = pyplot.subplots(1, 2, figsize=(12, 0.5 * rows["arm"].nunique() + 1.4), sharey=True)
    titles = {"reported_loss": "loss as reported", "yardstick_loss": "loss by one yardstick"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        intervals(axis, rows[rows["metric"] == metric], "arm", "ranks", horizontal=True)
        axis.set(title=title, xlabel="nats")
    axes[1].legend()


@figure
def earlier_table(report: Report) -> None:
    """Losses that a log of rank 0's last batch could have shown, beside the earlier table's three."""
    _, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    titles = {SOUND: "trained soundly", EARLIER_RECIPE: "trained by the earlier recipe"}
    for axis, (fault, title) in zip(axes, titles.items(), strict=True):
        losses = last_batches(report, fault)
        names, places = [ranks_label(ranks) for ranks in losses], range(len(losses))
        axis.boxplot(losses.values(), positions=places, tick_labels=names, whis=(2.5, 97.5), showfliers=False)
        axis.plot(places, [EARLIER[ranks] for ranks in losses], "kX", markersize=10, label="the earlier table")
        axis.set(title=title, yscale="log")
    axes[0].set_ylabel("rank 0's batch loss in the last epoch, nats\n(box: quartiles, whiskers: 95 %)")
    axes[1].legend()
