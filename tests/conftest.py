"""What tests share: a place of their own for run folders, a tiny study on the real data, its trained runs."""

import os
import shutil
import tempfile

os.environ["VQA_RUNS"] = tempfile.mkdtemp(prefix="vqa-tests-")  # before vqa is imported
os.environ["HF_HOME"] = os.path.join(os.environ["VQA_RUNS"], "hub")  # empty: no test depends on a download
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from vqa.config import ROOT, Profile, RunConfig, load_profile

os.environ["PYTHONPATH"] = str(ROOT / "src")  # the processes that tests start import this checkout, as pytest does

TINY = {
    "seeds": [0],
    "data": {"source": "easy_vqa", "validation_images": 32, "train_images": 64, "test_images": 32},
    "models.teacher": {
        "image_encoder": {"kind": "vit", "width": 32, "layers": 2, "heads": 2, "patch_size": 16, "stem": "patch"},
        "text_encoder": {"kind": "bert", "width": 32, "layers": 1, "heads": 2},
        "fusion": {"kind": "concat", "width": 32},
    },
    "models.student": {
        "image_encoder": {"kind": "resnet18", "width": 32},
        "text_encoder": {"kind": "distilbert", "width": 24, "layers": 1, "heads": 2},
        "fusion": {"kind": "concat", "width": 32},
    },
    "train.teacher": {"epochs": 2, "global_batch_size": 16},
    "train.student": {"epochs": 2, "global_batch_size": 16},
    "alignment": None,
    "launch": {"world_size": 1, "device": "cpu", "threads_per_rank": 1},
    "benchmark_steps": 5,
    "distillation": {"temperature": 2.0, "alpha": 0.7, "feature_weight": 1.0, "token_weight": 1.0},
    "scaling": {"images": 64, "epochs": 2, "steps": 3},
    "forensics": {"seeds": [0], "images": 64, "epochs": 1},
}


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["VQA_RUNS"], ignore_errors=True)


@pytest.fixture(autouse=True)
def threads_as_before():
    """Jobs set their number of threads, which decides the last bits of a sum; the next test must not inherit it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_profile() -> Profile:
    """The default profile with 64 + 32 + 32 images and towers of a few thousand weights."""
    return load_profile("default", TINY)


@pytest.fixture(scope="session")
def tiny(tiny_profile) -> RunConfig:
    """A teacher's run: transformers only, so that nothing in it depends on how a batch is shared out."""
    return tiny_profile.run("teacher")


@pytest.fixture(scope="session")
def source(tiny):
    from vqa.data import source as sources

    return sources.load(tiny.data)


@pytest.fixture(scope="session")
def processor(tiny, source):
    from vqa.training.objectives import processor_for

    return processor_for(tiny, source)


@pytest.fixture(params=["teacher", "student"])
def role(request) -> str:
    return request.param


@pytest.fixture
def model(role, tiny_profile, processor):
    """A VQAModel of each role with random weights, as training would build it; in eval mode."""
    import torch

    from vqa.models.vqa_model import VQAModel

    torch.manual_seed(0)
    return VQAModel(tiny_profile.run(role).model, processor).eval()


@pytest.fixture(scope="session")
def trained(tiny_profile) -> dict:
    """Finished runs for all tests to look at, trained two at a time by torchrun.

    `alone` and `pair` start from the towers of the run `aligned`, on one and two ranks;
    `aligned_pair` is `aligned` on two ranks.
    """
    from vqa.run_folder import Run
    from vqa.study.launch import launch

    settings = {"epochs": 2, "global_batch_size": 16}
    profile = load_profile("default", TINY | {"alignment": {"teacher": settings}})
    alone, pair = (profile.run("teacher", launch__world_size=ranks) for ranks in (1, 2))
    runs = {
        "alone": Run(alone),
        "pair": Run(pair.model_copy(update={"parent": alone.parent})),
        "aligned": Run(alone.parent),
        "aligned_pair": Run(pair.parent),
    }
    launch([runs["aligned"], runs["aligned_pair"]], at_once=2)
    launch([runs["alone"], runs["pair"]], at_once=2)
    return runs


@pytest.fixture
def keep_untrained(processor, tmp_path, monkeypatch):
    """Gives a function that makes a RunConfig a finished run with random weights, its folder in a place of its own."""
    import torch

    from vqa import run_folder as runs
    from vqa.models.build import vqa_model

    monkeypatch.setattr(runs, "RUNS", tmp_path)

    def keep(config: RunConfig, seed: int = 0, processor=processor) -> runs.Run:
        torch.manual_seed(seed)
        run = runs.Run(config)
        with run.writing():
            vqa_model(config.model, processor).save(run.folder / "model")
            run.finish([])
        return run

    return keep


@pytest.fixture
def untrained_teacher(keep_untrained, tiny):
    """The tiny profile's teacher as a finished run."""
    return keep_untrained(tiny)


@pytest.fixture(scope="session")
def one_rank():
    """This process as a job of one rank, without torchrun."""
    import torch.distributed as dist

    from vqa.evaluation.evaluate import one_rank

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield one_rank()
    dist.destroy_process_group()


@pytest.fixture
def photo(tmp_path):
    """64 x 64, all pixels different in hue from left to right, and darker to the bottom."""
    import numpy as np
    from PIL import Image

    across, down = np.meshgrid(np.arange(64), np.arange(64))
    pixels = np.stack([4 * across, 255 - 4 * across, 255 - 3 * down], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def train_here(one_rank, tmp_path, monkeypatch):
    """Gives a function that trains a RunConfig in this process, its run folder at a place of its own."""
    import torch

    from vqa import run_folder as runs
    from vqa.training import train as training

    def train(config: RunConfig, place: str = "") -> runs.Run:
        monkeypatch.setattr(runs, "RUNS", tmp_path / place)
        run = runs.Run(config)
        with run.writing():
            training.train(config, run, one_rank)
        return run

    monkeypatch.setattr(runs, "RUNS", tmp_path)
    yield train
    torch.use_deterministic_algorithms(False)
