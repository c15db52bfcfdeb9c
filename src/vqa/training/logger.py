"""How far a training run has come: what it says of itself, and how it is found again after a stop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import save_model

from vqa.distributed import Rank, Stopped, all_reduce_sum, from_main, gather_objects, main_first, stop_if_asked
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training import checkpoint

LOGS_PER_EPOCH = 4


class TrainingError(RuntimeError):
    """Training that cannot go on; its message says where it stopped. Every rank raises it alike."""


@dataclass
class _Window:
    """What happened since the last line of the log."""

    loss: torch.Tensor | float = 0.0
    steps: int = 0
    pairs: int = 0
    started: float = 0.0


class Reporter:
    """Progress as plain lines, one every quarter of an epoch, on screen, in log.txt and metrics.jsonl."""

    FILES = ("metrics.jsonl", "log.txt")

    def __init__(self, run: Run, rank: Rank, trainer):
        self.run, self.rank, self.trainer = run, rank, trainer
        self.every = max(trainer.steps_per_epoch // LOGS_PER_EPOCH, 1)
        self.started = time.perf_counter()
        self.window = _Window(started=self.started)

    @property
    def elapsed(self) -> float:
        """Seconds of training, without those that a stop cost."""
        return time.perf_counter() - self.started

    def start(self) -> None:
        """A run that is written again starts its records again."""
        if self.rank.is_main:
            for name in self.FILES:
                (self.run.folder / name).unlink(missing_ok=True)

    def state(self) -> dict:
        """What a checkpoint keeps: the records as they are now, and the window under way but for its loss."""
        files = [self.run.folder / name for name in self.FILES]
        return {
            "elapsed": self.elapsed,
            "window": self.window.steps,
            "pairs": self.window.pairs,
            "window_elapsed": time.perf_counter() - self.window.started,
            "files": {path.name: path.read_text() if path.is_file() else "" for path in files},
        }

    def go_on(self, state: dict, loss: torch.Tensor) -> None:
        """Continue from `state`, with this rank's `loss` of the window; later lines are forgotten."""
        now = time.perf_counter()
        self.started = now - state["elapsed"]
        self.window = _Window(loss, state["window"], state["pairs"], now - state["window_elapsed"])
        if self.rank.is_main:
            for name, text in state["files"].items():
                with self.run.replacing(name) as path:
                    path.write_text(text)

    def say(self, text: str) -> None:
        if self.rank.is_main:
            print(text, flush=True)
            with (self.run.folder / "log.txt").open("a") as file:
                file.write(text + "\n")

    def step(self, epoch: int, step: int, pairs: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Count a step; write the window's mean loss over all ranks when it is full."""
        window = self.window
        window.loss, window.steps, window.pairs = window.loss + loss, window.steps + 1, window.pairs + pairs
        if (step + 1) % self.every:
            return
        mean = (all_reduce_sum(window.loss) / window.steps / self.rank.world_size).item()
        now = time.perf_counter()
        rate = window.pairs / (now - window.started)
        seconds = (now - window.started) / window.steps
        lr = self.trainer.schedule.get_last_lr()[0]
        done = epoch * self.trainer.steps_per_epoch + step + 1
        epochs, steps = self.trainer.config.train.epochs, self.trainer.steps_per_epoch
        self.say(
            f"epoch {epoch + 1:>2}/{epochs}  step {step + 1:>4}/{steps}"
            f"  loss {mean:.4f}  lr {lr:.1e}  {rate:,.0f} questions/s"
        )
        if self.rank.is_main:
            self.run.log_metrics(
                step=done,
                epoch=epoch + 1,
                loss=mean,
                lr=lr,
                grad_norm=norm.item(),
                questions_per_second=rate,
                step_seconds=seconds,
            )
        self.window = _Window(started=time.perf_counter())

    def epoch(self, epoch: int, score: float, better: bool) -> None:
        elapsed = self.elapsed
        left = elapsed / (epoch + 1) * (self.trainer.config.train.epochs - epoch - 1)
        self.say(
            f"epoch {epoch + 1:>2}  validation {100 * score:.2f} %{' (best)' if better else ''}"
            f"  {elapsed:.0f} s, {left:.0f} s to go"
        )
        if self.rank.is_main:
            done = (epoch + 1) * self.trainer.steps_per_epoch
            self.run.log_metrics(step=done, epoch=epoch + 1, validation=100 * score, seconds=elapsed)
        self.window = _Window(started=time.perf_counter())


class Progress:
    """How far a run has come: told of every step and validation, kept in checkpoints, found again after a stop."""

    KEPT = ("epoch", "step_in_epoch", "best", "best_epoch", "saving_seconds")

    def __init__(self, run: Run, rank: Rank, trainer, reporter: Reporter, fingerprint: dict[str, str]):
        self.run, self.rank, self.trainer, self.reporter, self.fingerprint = run, rank, trainer, reporter, fingerprint
        self.folder = run.folder / "checkpoints"
        self.best_weights = self.folder / checkpoint.BEST
        self.epoch, self.step_in_epoch = 0, 0  # the next step to take; after an epoch's last comes its validation
        self.best, self.best_epoch = -1.0, 0
        self.saved: str | None = None  # the last checkpoint's name
        self.saving_seconds = 0.0
        self.training = True  # until the last validation

    @property
    def over(self) -> bool:
        train = self.trainer.config.train
        return self.epoch == train.epochs or self._no_better_for(train.patience)

    def _no_better_for(self, epochs: int | None) -> bool:
        return bool(epochs) and self.epoch - 1 - self.best_epoch >= epochs

    def step(self, epoch: int, step: int, pairs: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """What Trainer.epoch says of each step it took. Raises Stopped on every rank if one was asked to stop."""
        self.reporter.step(epoch, step, pairs, loss, norm)
        self.step_in_epoch = step + 1
        stop_if_asked(self.rank)
        if self.step_in_epoch < self.trainer.steps_per_epoch and self._due:  # else after the validation
            self.save()

    def judged(self, score: float) -> None:
        """Note the validation of the epoch whose steps are all taken; keep its model if there was none better."""
        if better := score > self.best:
            self.best, self.best_epoch = score, self.epoch
            main_first(self._keep_best, self.rank)
        self.reporter.epoch(self.epoch, score, better)
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        if self._no_better_for(patience := self.trainer.config.train.patience):
            self.reporter.say(f"no better validation for {patience} epochs: stopping")
        if self._due or self.over:
            self.save()

    @property
    def _due(self) -> bool:
        return self.trainer.schedule.last_epoch % self.trainer.config.train.checkpoint_every_steps == 0

    def _keep_best(self) -> None:
        """A kill before the next checkpoint does no harm: this file is then replaced by the older checkpoint's."""
        with self.run.replacing(f"checkpoints/{checkpoint.BEST}") as path, checkpoint.written(self.best_weights):
            save_model(self.trainer.objective.model, str(path))

    def save(self) -> None:
        """Write a checkpoint of every rank's state. Raises CheckpointError on every rank if it cannot be written."""
        started = time.perf_counter()
        trainer = self.trainer
        mine = {
            "random": torch.get_rng_state(),  # nothing else draws: orders and flips come from an epoch's number
            "random_cuda": torch.cuda.get_rng_state() if self.rank.device.type == "cuda" else None,
            "buffers": {name: value.cpu() for name, value in trainer.objective.network.named_buffers()},
            "loss": torch.as_tensor(self.reporter.window.loss).cpu(),
        }
        ranks = gather_objects(mine, self.rank)  # BatchNorm's statistics differ between ranks without SyncBatchNorm
        main_first(lambda: self._write(ranks), self.rank)
        self.saved = f"step-{trainer.schedule.last_epoch}"
        self.saving_seconds += time.perf_counter() - started

    def _write(self, ranks: list[dict]) -> None:
        state = {name: getattr(self, name) for name in self.KEPT} | {
            "ranks": ranks,
            "optimizer": self.trainer.optimizer.state_dict(),
            "schedule": self.trainer.schedule.state_dict(),
            "reporter": self.reporter.state(),
        }
        network = self.trainer.objective.network
        checkpoint.save(self.folder, self.trainer.schedule.last_epoch, network, state, self.fingerprint)

    def resumed(self) -> bool:
        """Whether there was a checkpoint; everything is then as it was when that was written."""
        found: list[str] = []
        path = main_first(lambda: checkpoint.newest(self.folder, self.fingerprint, found.append), self.rank)
        if path := from_main(path):
            self._go_on(checkpoint.load(path, self.trainer.objective.network))
            self.saved = path.name
            found.append(f"{path.name} found: going on after step {self.step_in_epoch} of epoch {self.epoch + 1}")
        else:
            self.reporter.start()
        for text in found:
            self.reporter.say(text)
        return bool(path)

    def _go_on(self, state: dict) -> None:
        for name in self.KEPT:
            setattr(self, name, state[name])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.trainer.schedule.load_state_dict(state["schedule"])
        mine = state["ranks"][self.rank.rank]
        self.trainer.objective.network.load_state_dict(mine["buffers"], strict=False)
        self.reporter.go_on(state["reporter"], mine["loss"].to(self.rank.device))
        torch.set_rng_state(mine["random"])
        if mine["random_cuda"] is not None:
            torch.cuda.set_rng_state(mine["random_cuda"])

    @contextmanager
    def told_on_the_way_out(self) -> Iterator[None]:
        """When training ends before its time, what is kept of it is part of the sentence."""
        try:
            yield
        except Stopped:
            if self.training:
                self.save()
            raise TrainingError(f"stopped by a signal; start again to go on from {self.saved}") from None
        except TrainingError as error:
            raise TrainingError(f"{error}; the last good checkpoint is {self.saved or 'none yet'}") from None

    def checkpoint_share(self) -> Result:
        """The part of training time that checkpoints took."""
        return Result("checkpoint_share", self.saving_seconds / self.reporter.elapsed, "ratio")
