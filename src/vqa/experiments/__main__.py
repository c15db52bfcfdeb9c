"""Measurements of training steps, interleaved in one process so that drift hits every arm alike.

    torchrun --standalone --nproc-per-node 1 -m vqa.experiments --config FILE

`overfit`    one batch, again and again: a model that cannot learn it by heart has a defect
`grouping`   the study's batches against the same pairs with images and questions repeated
`precision`  fp32 and bf16 autocast, each with and without gradient checkpointing
`breakdown`  where the time of one training step goes
`sharing`    the fusion alone: an image's keys and values projected once, against once per pair
`costs`      several models side by side: operations, memory, training and answering speed
`full_size`  memory of a step with the public full-size towers, which no accuracy is claimed of
`caching`    a distillation step with cached targets, and with the teacher run beside it, against a plain step
`understanding`  agreement, swaps, calibration, robustness and CKA of trained models; the first is the teacher
`attention`  where a trained cross-attention model looks, for some right and some wrong answers
`quantization`, `cross_check`, `sensitivity`, `latency`, `latency_compiled`  what deployment gains and costs, see
               vqa.deployment
`qat`        3-bit weights before and after quantization-aware fine-tuning, see vqa.qat
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from vqa.config import ConfigError, load_section
from vqa.data import source as sources
from vqa.distributed import Rank, check_devices, process_group
from vqa.experiments.distillation import caching, understanding
from vqa.experiments.fusion import attention, costs, full_size, sharing
from vqa.experiments.measurement import BenchmarkConfig
from vqa.experiments.prototype import breakdown, grouping, overfit, precision
from vqa.experiments.quantization import cross_check, quantization, sensitivity
from vqa.experiments.quantization_aware import qat
from vqa.experiments.quantization_latency import latency
from vqa.results import Result
from vqa.run_folder import Run, RunError
from vqa.training.train import load_data

MEASURES = {
    measure.__name__: measure
    for measure in (
        *(overfit, grouping, precision, breakdown, sharing, costs, full_size, caching),
        *(cross_check, sensitivity, latency),
    )
}


def measure(config: BenchmarkConfig, source: sources.Source, rank: Rank, run: Run) -> list[Result]:
    if config.kind == "attention":
        return attention(Run(config.run), source, run)
    if config.kind == "understanding":
        return understanding([config.run, *config.others], source, rank.device)
    if config.kind in ("quantization", "qat"):
        return {"quantization": quantization, "qat": qat}[config.kind](config, source, rank, run)
    return MEASURES[config.kind.removesuffix("_compiled")](config, source, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training steps; start with torchrun.")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        config = load_section(BenchmarkConfig, arguments.config)
        check_devices(config.launch)
        run = Run(config, module="vqa.experiments")
        with process_group(config.launch) as rank, run.writing() if rank.is_main else nullcontext():
            source = load_data(config.run, rank)
            rows = measure(config, source, rank, run)
            if rank.is_main:
                run.finish(rows)
            for row in rows:
                print(f"{row.metric:28} {row.value:.4g} {row.unit}  {' '.join(row.labels.values())}", flush=True)
    except (ConfigError, RunError, sources.SourceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
