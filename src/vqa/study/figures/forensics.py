"""Figures of 04_scaling and 07_forensics, entered in FIGURES like the others."""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure

from vqa.experiments.forensics import EARLIER, EARLIER_RECIPE, SOUND
from vqa.study.figures.scaling import by_ranks, ranks_label
from vqa.study.figures.style import MARKERS, figure
from vqa.study.records import Record, Report


def examined(report: "Report") -> "list[Record]":
    """The records of forensics jobs, by number of simulated ranks and seed."""
    found = [record for record in report.records() if "ranks" in record.config]
    return sorted(found, key=lambda record: (record.config["ranks"], record.config["run"]["seed"]))


def last_batches(report: "Report", fault: str) -> dict[int, np.ndarray]:
    """Rank 0's own loss in every step of the last epoch under `fault`, all seeds, by number of ranks."""
    steps = pd.concat([record.metrics for record in examined(report)])
    chosen = steps[steps["fault"] == fault]
    return {ranks: losses.to_numpy() for ranks, losses in chosen.groupby("ranks")["first_rank"]}


@figure
def fault_effects(report: "Report") -> Figure:
    """What each fault has the log report, and what was learned by one yardstick, on 1, 2 and 4 ranks."""
    rows = by_ranks(pd.concat([pd.DataFrame(r.rows(report.profile)) for r in examined(report)]))
    faults = list(rows["engine"].unique())
    made, axes = pyplot.subplots(1, 2, figsize=(12, 0.5 * len(faults) + 1.4), sharey=True)
    titles = {"reported_loss": "loss as reported", "yardstick_loss": "loss by one yardstick"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for place, (ranks, group) in enumerate(rows[rows["metric"] == metric].groupby("world_size")):
            heights = np.array([faults.index(fault) for fault in group["engine"]]) + 0.2 * (place - 1)
            axis.plot(
                group["value"], heights, MARKERS[place], ms=6, mfc="none", color="black", label=ranks_label(ranks)
            )
        axis.set(title=title, xlabel="nats")
    axes[0].set_yticks(range(len(faults)), faults)
    axes[0].invert_yaxis()
    axes[1].legend()
    made.tight_layout()
    return made


@figure
def earlier_table(report: "Report") -> Figure:
    """Losses that a log of rank 0's last batch could have shown, beside the earlier table's three."""
    made, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    titles = {SOUND: "trained soundly", EARLIER_RECIPE: "trained by the earlier recipe"}
    for axis, (fault, title) in zip(axes, titles.items(), strict=True):
        losses = last_batches(report, fault)
        places = range(1, len(losses) + 1)
        axis.boxplot(losses.values(), positions=places, widths=0.5, whis=(2.5, 97.5), showfliers=False)
        axis.plot(places, [EARLIER[ranks] for ranks in losses], "kX", ms=10, label="the earlier table")
        axis.set_xticks(places, [ranks_label(ranks) for ranks in losses])
        axis.set(title=title, yscale="log")
    axes[0].set_ylabel("rank 0's batch loss in the last epoch, nats\n(box: quartiles, whiskers: 95 %)")
    axes[1].legend()
    made.tight_layout()
    return made
