"""The one entry of all measurements; vqa.results.KINDS says what each of them measures.

torchrun --standalone --nproc-per-node N -m vqa.experiments --config FILE
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from vqa.config import ConfigError, MeasurementConfig, load_section
from vqa.data.source import SourceError
from vqa.deployment.onnx_int8 import QuantizeError
from vqa.distributed import LateRank, check_devices, exit_with, main_first, process_group
from vqa.experiments.measurement import Measurement, measure_of
from vqa.run_folder import Run, RunError
from vqa.training.train import TrainingError, load_data


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure; start with torchrun.")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        config = load_section(MeasurementConfig, arguments.config)
        check_devices(config.launch)
        run = Run(config)
        with process_group(config.launch) as rank, ExitStack() as held:
            main_first(lambda: held.enter_context(run.writing()), rank)
            if rank.is_main:
                (run.folder / "metrics.jsonl").unlink(missing_ok=True)  # of an attempt that did not finish
            rows = measure_of(config.kind)(Measurement(config, load_data(config.runs[0], rank), rank, run))
            if rank.is_main:
                run.finish(rows)
                for row in rows:
                    words = [str(word) for word in (row.model, row.fusion, row.arm, row.precision, row.engine) if word]
                    print(f"{row.metric:32} {row.value:.4g} {row.unit}  {', '.join(words)}", flush=True)
    except (ConfigError, RunError, TrainingError) as error:  # every rank raises these alike
        exit_with(error)
    except (SourceError, QuantizeError, LateRank) as error:
        exit_with(error, alone=True)


if __name__ == "__main__":
    main()
