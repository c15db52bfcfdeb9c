"""The figures of 04_scaling."""

from itertools import cycle

import pandas as pd
from matplotlib import pyplot

from vqa.results import PARITY_STEPS, TOLERANCE
from vqa.study.figures.style import DASHES, MARKERS, figure, intervals, measured, ranks_label, records_of
from vqa.study.records import Report


@figure
def parity_curves(report: Report) -> None:
    """Every step's loss at each world size, overlaid, and how far each lies from one rank's."""
    jobs = records_of(report, "parity")
    curves = pd.concat([job.metrics.assign(ranks=job.run["launch"]["world_size"]) for job in jobs])
    losses = curves[curves["step"] <= PARITY_STEPS].pivot(index=["arm", "step"], columns="ranks", values="loss")
    arms = list(curves["arm"].unique())
    _, axes = pyplot.subplots(2, len(arms), figsize=(4.4 * len(arms), 6), sharex=True, squeeze=False)
    for (top, bottom), arm in zip(axes.T, arms, strict=True):
        curve = losses.loc[arm].rename(columns=ranks_label)
        apart = curve.iloc[:, 1:].div(curve.iloc[:, 0], axis=0).sub(1).abs().clip(lower=1e-9)  # 0 has no logarithm
        for place, name in enumerate(curve):
            top.plot(curve[name], DASHES[place % len(DASHES)], linewidth=4 / (place + 1), label=name)
        for marker, name in zip(cycle(MARKERS[1:]), apart):
            bottom.plot(apart[name], marker, color="black", markersize=4, fillstyle="none", label=name)
        bottom.axhline(TOLERANCE, color="black", linewidth=1, linestyle="--", label="allowed")
        top.set(title=arm)
        bottom.set(xlabel="step", yscale="log", ylim=(5e-10, 1))
    axes[0, 0].set_ylabel("loss, nats")
    axes[1, 0].set_ylabel("relative difference\nfrom one rank")
    axes[0, -1].legend()
    axes[1, -1].legend()


@figure
def step_times(report: Report) -> None:
    """A training step on 1, 2, … ranks: measured, and predicted from computing alone plus exchange."""
    rows = measured(report, "speed")
    _, axes = pyplot.subplots(1, 2, figsize=(11, 3.8))
    titles = {"plain": "one global batch, shared out", "plain, accumulated": "four global batches, exchanged once"}
    for axis, (arm, title) in zip(axes, titles.items(), strict=True):
        own = rows[rows["arm"] == arm]
        found = own[own["metric"] == "step_seconds"]
        predicted = own[own["metric"] == "predicted_step_seconds"].set_index("ranks")["value"]
        intervals(axis, found, "ranks", bars=True, scale=1e3)
        axis.plot(1e3 * predicted.reindex(found["ranks"]).to_numpy(), "kD", mfc="none", ms=8, label="predicted")
        axis.plot(1e3 * found["value"].iloc[0] / found["world_size"].to_numpy(), "k:", label="ideal")
        axis.set(title=title, xlabel="bars: measured [95 %]", ylabel="step, ms")
    axes[0].legend()


@figure
def ddp_options(report: Report) -> None:
    """Each option of DistributedDataParallel alone: its step over the plain one's, on two ranks."""
    time_ratios(report, "speed")


@figure
def training_levers(report: Report) -> None:
    """This study's loop with one change at a time: its step over the unchanged one's."""
    time_ratios(report, "loops")


def time_ratios(report: Report, kind: str) -> None:
    """The step_time_ratio of every arm of the measurement `kind`, with its interval."""
    rows = measured(report, kind).query("metric == 'step_time_ratio'")
    _, axis = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.2))
    intervals(axis, rows, "arm", horizontal=True)
    axis.axvline(1, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel="step time ÷ plain step time (below 1: faster) [95 %]")


@figure
def training_loops(report: Report) -> None:
    """Questions a second of this study's loop and of others on the same pairs."""
    rows = measured(report, "loops").query("metric == 'questions_per_second'")
    _, axis = pyplot.subplots(figsize=(9, 3.2))
    rows = rows.sort_values("value", ascending=False)
    intervals(axis, rows, "arm", bars=True, horizontal=True, number="{:,.0f}")
    axis.set(xlabel="questions a second in training [95 %]")
