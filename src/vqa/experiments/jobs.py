"""The measurements that a notebook asks for several at a time: one a number of ranks, one a seed."""

from vqa.config import MeasurementConfig, Profile, RunConfig
from vqa.results import EARLIER

SOUND_BATCH = 64  # pairs a step of a sound training in 07_forensics, on any number of ranks


def parity_configs(runs: list[RunConfig], world_sizes: list[int]) -> list[MeasurementConfig]:
    """One parity job a world size, each but the first compared with the first."""
    configs: list[MeasurementConfig] = []
    for ranks in world_sizes:
        launch = runs[0].launch.model_copy(update={"world_size": ranks})
        shared = [run.model_copy(update={"launch": launch}) for run in runs]
        configs.append(MeasurementConfig(kind="parity", runs=shared, reference=configs[0] if configs else None))
    return configs


def forensics_configs(profile: Profile) -> list[MeasurementConfig]:
    """One job a seed and number of simulated ranks, on the student's towers, which learn fastest."""
    study = profile.forensics
    configs = []
    for seed in study.seeds:
        run = profile.run("student", seed, data__train_images=study.images, launch__world_size=1).parent
        train = run.train.model_copy(update={"epochs": study.epochs, "global_batch_size": SOUND_BATCH})
        run = run.model_copy(update={"train": train})
        configs += [MeasurementConfig(kind="forensics", runs=[run], simulated_ranks=ranks) for ranks in EARLIER]
    return configs
