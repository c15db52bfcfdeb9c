"""Run folders: one place for all that a run writes, whole or not there at all.

    runs/<name>-<config hash>/
        config.yaml  env.json  metrics.jsonl  log.txt  checkpoints/  model/  predictions.parquet
        results.json      written last: its presence means the run is finished

Every file is written under a temporary name and renamed. A lock refuses a second writer.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """One figure of the study: a row of results.csv. `value` is in `unit`; low..high is a 95 % interval."""

    metric: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    split: str = ""
    labels: dict[str, str] = field(default_factory=dict)  # overrides of model, precision, engine, …
