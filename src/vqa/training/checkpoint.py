"""Checkpoints: what a training run needs to go on as if it had never stopped.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

KEPT = 2  # the newest, and the one before in case it is damaged
WEIGHTS, BEST, STATE, MANIFEST = "weights.safetensors", "best.safetensors", "state.pt", "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be used; its message is one sentence for the user."""


def save(folder: Path, step: int, network: nn.Module, state: dict, fingerprint: dict[str, str]) -> Path:
    """Write step-<`step`> into `folder`, whose best.safetensors it keeps too; the oldest but KEPT are removed.

    Raises CheckpointError if it cannot be written; those before it are then as they were.
    """
    final = folder / f"step-{step}"
    temporary = folder / f".{final.name}"
    try:
        with written(final):
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
    for older in steps(folder)[:-KEPT]:
        _remove(older)
    return final


@contextmanager
def written(path: Path) -> Iterator[None]:
    """A failure to write within the block is a CheckpointError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {path}: {reason}; make room, then start again") from None


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def newest(folder: Path, fingerprint: dict[str, str], say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, None without one; `say` is told of each that is damaged.

    What a killed process left half-written is removed, and best.safetensors becomes the checkpoint's own.
    Raises CheckpointError if it belongs to other data or another configuration than `fingerprint`.
    """
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)
    for path in reversed(steps(folder)):
        if found := damage(path):
            say(f"checkpoint {path.name} is damaged ({found}): passed over for the one before")
            continue
        belongs = json.loads((path / MANIFEST).read_text())["fingerprint"]
        for what, wanted in fingerprint.items():
            if belongs[what] != wanted:
                raise CheckpointError(
                    f"checkpoint {path} belongs to {what} {belongs[what]}, not {wanted}: remove {folder} to start anew"
                )
        _take_best(path, folder)
        return path
    (folder / BEST).unlink(missing_ok=True)
    return None


def _take_best(path: Path, folder: Path) -> None:
    (folder / BEST).unlink(missing_ok=True)
    if (path / BEST).is_file():
        link(path / BEST, folder / BEST)


def load(path: Path, network: nn.Module) -> dict:
    """Put the weights of checkpoint `path` into `network`; its state."""
    load_model(network, str(path / WEIGHTS))
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def forget(folder: Path) -> None:
    """Remove every checkpoint in `folder`: its run has finished."""
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
