import pytest


@pytest.fixture(scope="session")
def measurement(source, one_rank):
    """Gives a function that makes the Measurement of a kind on some runs, in this process alone."""
    from vqa.config import MeasurementConfig
    from vqa.experiments.measurement import Measurement
    from vqa.run_folder import Run

    def make(kind: str, *runs, source=source, **settings) -> Measurement:
        config = MeasurementConfig(kind=kind, runs=list(runs), **settings)
        return Measurement(config, source, one_rank, Run(config))

    return make
