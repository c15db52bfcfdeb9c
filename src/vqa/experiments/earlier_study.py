"""The earlier study's table beside this study's results. Tables in, tables out: nothing here trains."""

import numpy as np
import pandas as pd

from vqa.results import EARLIER


def spread(*losses: float) -> float:
    """How far `losses` lie apart, ln(largest / smallest), in percent of how far the earlier table's do."""
    earlier = max(EARLIER.values()) / min(EARLIER.values())
    return 100 * float(np.log(max(losses) / min(losses)) / np.log(earlier))


def explained(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a fault of the forensics results `rows`: its reported loss by ranks, and how far the ranks lie apart.

    That is in percent of the earlier spread; beside it the same by the yardstick, and for single batches of rank 0
    (95 % of those of the last epoch, the mean over ranks). Means over seeds, in brackets the lowest and the highest.
    `trained` says whether the ranks were trained one by one, or once because they cannot differ.
    """
    table = []
    for fault, group in rows.astype({"world_size": int}).groupby("arm", sort=False):
        found = group.pivot_table(index=["metric", "seed"], columns="world_size", values="value")
        reported, yardsticks = found.loc["reported_loss"], found.loc["yardstick_loss"]
        shares = {
            "spread over ranks, %": reported.apply(lambda losses: spread(*losses), axis=1),
            "by the yardstick, %": yardsticks.apply(lambda losses: spread(*losses), axis=1),
            "by which batch was last, %": found.loc["last_batch_spread"].mean(axis=1),
        }
        losses = {f"reported, {ranks} rank{'s' * (ranks > 1)}": reported[ranks] for ranks in reported}
        once = group.groupby("seed")["run"].nunique().eq(1).all()
        trained = "once: no step depends on ranks" if once else "on each number of ranks"
        cells = {name: _mean_and_range(values) for name, values in (losses | shares).items()}
        table.append({"fault": fault, "trained": trained} | cells)
    return pd.DataFrame(table).set_index("fault")


def _mean_and_range(values: pd.Series) -> str:
    return f"{values.mean():.3g}" + (f" [{values.min():.3g}, {values.max():.3g}]" if len(values) > 1 else "")


def last_batches(steps: pd.DataFrame, fault: str) -> dict[int, np.ndarray]:
    """Rank 0's own loss in every step of the last epoch under `fault`, by number of ranks.

    `steps` are the metrics.jsonl of forensics runs, one after the other.
    """
    chosen = steps[steps["fault"] == fault]
    return {ranks: losses.to_numpy() for ranks, losses in chosen.groupby("ranks")["first_rank"]}


def reconstructed(losses: dict[int, np.ndarray]) -> dict[str, float]:
    """How often single batches, one drawn at each number of ranks, repeat the earlier table.

    `losses` as `last_batches` gives them. `order`: the share of draws with four ranks below one below two (a sixth by
    chance alone); `apart`: with two ranks at least as many times above four as published; `reach`: the largest ratio
    of two to four ranks; `span`: how far the most favourable draws of any ranks lie apart, in percent of how far the
    published losses do.
    """
    one, two, four = (losses[ranks] for ranks in EARLIER)
    ratios = two[:, None] / four
    return {
        "order": float(np.mean([(four < loss).mean() * (two > loss).mean() for loss in one])),
        "apart": float((ratios >= EARLIER[2] / EARLIER[4]).mean()),
        "reach": float(ratios.max()),
        "span": spread(*(end(batch) for batch in losses.values() for end in (min, max))),
    }


def earlier_form(rows: pd.DataFrame) -> pd.DataFrame:
    """The results `rows` of parity and speed in the form of the earlier table, one row a number of ranks."""
    rows = rows.astype({"world_size": int})
    parity = rows[(rows["kind"] == "parity") & (rows["arm"] == "answers")]
    learned = parity.pivot_table(index="world_size", columns="metric", values="value")
    plain = rows[(rows["kind"] == "speed") & (rows["metric"] == "step_seconds") & (rows["arm"] == "plain")]
    seconds = plain.set_index("world_size")["value"]
    table = []
    for ranks, found in learned.iterrows():
        right = 100 * found["questions_right"] / found["questions_answered"]
        speed = seconds[1] / seconds[ranks] if ranks in seconds.index else float("nan")
        apart = found.get("loss_max_relative_difference", 0.0)
        table.append(
            {
                "set-up": f"{ranks} rank{'s' if ranks > 1 else ''}",
                "final loss": f"{found['final_loss']:.4f}",
                "accuracy, %": f"{right:.2f}",
                "relative speed": f"{speed:.2f}×",
                "note": f"loss curve within {apart:.0e} of one rank's" if ranks > 1 else "the reference",
            }
        )
    return pd.DataFrame(table)
