"""Checkpoints: what a training run needs to go on as if it had never stopped.

    runs/<run>/checkpoints/best.safetensors    the best model so far
    runs/<run>/checkpoints/step-<n>/
        weights.safetensors  of the network that is trained
        best.safetensors     of the best model so far (a hard link: nothing is written twice)
        state.pt             optimizer, schedule, position, random states; tensors and plain values only
        manifest.json        SHA-256 of every file, and which data and configuration they belong to

A folder is written under a temporary name, flushed to the disk and renamed: it is whole or not there.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from vqa.distributed import Rank, from_main, main_first
from vqa.run_folder import Run

NEWEST = 2  # checkpoints that stay: the newest, and the one before in case it is damaged
WEIGHTS, BEST, STATE, MANIFEST = "weights.safetensors", "best.safetensors", "state.pt", "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be used; its message is one sentence for the user."""


class Checkpoints:
    """The checkpoints of one run. Every rank calls these methods, the main rank alone writes.

    `fingerprint` says which configuration and data they belong to. What fails on the main rank, all ranks raise.
    """

    def __init__(self, run: Run, rank: Rank, fingerprint: dict[str, str]):
        self.run, self.rank, self.fingerprint = run, rank, fingerprint
        self.folder = run.folder / "checkpoints"
        self.best = self.folder / BEST
        self.last: str | None = None  # the name of the newest

    def save(self, step: int, network: nn.Module, state: dict) -> None:
        """Raises CheckpointError if step-<`step`> cannot be written."""
        main_first(lambda: save(self.folder, step, network, state, self.fingerprint), self.rank)
        self.last = f"step-{step}"

    def save_best(self, model: nn.Module) -> None:
        """Raises CheckpointError if it cannot be written.

        A kill before the next checkpoint does no harm: this file is then replaced by the older checkpoint's.
        """
        main_first(lambda: self._write_best(model), self.rank)

    def _write_best(self, model: nn.Module) -> None:
        with self.run.replacing(f"checkpoints/{BEST}") as path, one_sentence(self.best):
            save_model(model, str(path))

    def newest(self) -> tuple[Path | None, list[str]]:
        """As the function `newest`; the sentences are empty on other ranks than the main one."""
        path, damaged = main_first(lambda: newest(self.folder, self.fingerprint), self.rank) or (None, [])
        path = from_main(path)
        self.last = path.name if path else None
        return path, damaged


def save(folder: Path, step: int, network: nn.Module, state: dict, fingerprint: dict[str, str]) -> None:
    """Write step-<`step`> into `folder`, its best.safetensors included; of the older ones NEWEST - 1 stay.

    Raises CheckpointError if it cannot be written; those before it are then as they were.
    """
    final = folder / f"step-{step}"
    temporary = folder / f".{final.name}"
    try:
        with one_sentence(final):
            temporary.mkdir(parents=True)
            save_model(network, str(temporary / WEIGHTS))
            packed = io.BytesIO()  # on a full disk the file then raises OSError, which torch.save does not
            torch.save(state, packed)
            (temporary / STATE).write_bytes(packed.getbuffer())
            if (folder / BEST).is_file():
                link(folder / BEST, temporary / BEST)
            (temporary / MANIFEST).write_text(json.dumps(_manifest(temporary, fingerprint), indent=1))
            for path in (*temporary.iterdir(), temporary):
                _flush(path)
            _remove(final)  # there after a stop between an epoch's last step and its validation
            os.rename(temporary, final)
            _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for older in steps(folder)[:-NEWEST]:
        _remove(older)


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Turn a failure to write within the block into a CheckpointError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {path}: {reason}; make room, then start again") from None


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def newest(folder: Path, fingerprint: dict[str, str]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, None without one, and a sentence about each damaged one that is newer.

    What a killed process left half-written is removed, and best.safetensors becomes the checkpoint's own.
    Raises CheckpointError if it belongs to other data or another configuration than `fingerprint`.
    """
    damaged = []
    for half_written in folder.glob(".step-*"):
        shutil.rmtree(half_written)
    for path in reversed(steps(folder)):
        if found := damage(path):
            damaged.append(f"checkpoint {path.name} is damaged ({found}): passed over for the one before")
            continue
        belongs = json.loads((path / MANIFEST).read_text())["fingerprint"]
        for what, wanted in fingerprint.items():
            if belongs[what] != wanted:
                raise CheckpointError(
                    f"checkpoint {path} belongs to {what} {belongs[what]}, not {wanted}: remove {folder} to start anew"
                )
        (folder / BEST).unlink(missing_ok=True)
        if (path / BEST).is_file():
            link(path / BEST, folder / BEST)
        return path, damaged
    (folder / BEST).unlink(missing_ok=True)
    return None, damaged


def load(path: Path, network: nn.Module) -> dict:
    """Put the weights of checkpoint `path` into `network`; its state."""
    load_model(network, str(path / WEIGHTS))
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def remove_all(folder: Path) -> None:
    """Remove every checkpoint in `folder`: its run has finished. The best model stays."""
    for path in steps(folder):
        _remove(path)


def damage(path: Path) -> str | None:
    """What is wrong with checkpoint `path`, in words; None if every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digest, files = manifest.pop("sha256"), manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if digest != _digest(json.dumps(manifest).encode()):
        return f"{MANIFEST} was changed"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != expected:
            return f"{name} was changed"
    return None


def link(source: Path, target: Path) -> None:
    """`target` with the content of `source`, which must only ever be replaced, not written over."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _manifest(folder: Path, fingerprint: dict[str, str]) -> dict:
    manifest = {"files": {path.name: sha256(path) for path in sorted(folder.iterdir())}, "fingerprint": fingerprint}
    return manifest | {"sha256": _digest(json.dumps(manifest).encode())}


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed no longer bears its name."""
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.removed")
        os.rename(path, hidden)
        shutil.rmtree(hidden)
