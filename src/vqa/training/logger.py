"""What a training run says of itself: lines on screen and in log.txt, numbers in metrics.jsonl."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from vqa.distributed import Rank, all_reduce_sum
from vqa.run_folder import Run

LINES_PER_EPOCH = 4


@dataclass(frozen=True)
class Step:
    """What one optimizer step did, as one rank saw it."""

    epoch: int
    step: int  # of the epoch; both counted from 0
    loss: torch.Tensor  # (), this rank's: the mean over ranks is the step's
    norm: torch.Tensor  # (), of the whole step's gradient, before clipping
    lr: float  # of the next step
    pairs: int  # of all ranks
    images: np.ndarray  # (I,) the numbers of those in this rank's batches


@dataclass
class _Window:
    """What happened since the last line about steps."""

    loss: torch.Tensor | float = 0.0  # this rank's, summed over steps
    steps: int = 0
    pairs: int = 0
    started: float = field(default_factory=time.perf_counter)


class Logger:
    """Writes a line every quarter of an epoch and one a validation. Every rank calls it; the main rank writes."""

    FILES = ("metrics.jsonl", "log.txt")

    def __init__(self, run: Run, rank: Rank, epochs: int, steps_per_epoch: int):
        self.run, self.rank, self.epochs, self.steps_per_epoch = run, rank, epochs, steps_per_epoch
        self.every = max(steps_per_epoch // LINES_PER_EPOCH, 1)  # steps
        self.started = time.perf_counter()
        self.window = _Window()

    @property
    def seconds(self) -> float:
        """Seconds of training, without those that a stop cost."""
        return time.perf_counter() - self.started

    def clear(self) -> None:
        """Remove what an earlier attempt wrote, for a run that starts from its first step."""
        if self.rank.is_main:
            for name in self.FILES:
                (self.run.folder / name).unlink(missing_ok=True)

    def state_dict(self) -> dict:
        """This rank's clock and sums; on the main rank also the text of both files, so that they can be restored."""
        files = [self.run.folder / name for name in self.FILES] if self.rank.is_main else []
        window = self.window
        return {
            "seconds": self.seconds,
            "loss": torch.as_tensor(window.loss).cpu(),
            "steps": window.steps,
            "pairs": window.pairs,
            "window_seconds": time.perf_counter() - window.started,
            "files": {path.name: path.read_text() if path.is_file() else "" for path in files},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`: lines that were written after it are dropped."""
        now = time.perf_counter()
        self.started = now - state["seconds"]
        loss = state["loss"].to(self.rank.device)
        self.window = _Window(loss, state["steps"], state["pairs"], now - state["window_seconds"])
        for name, text in state["files"].items():
            with self.run.replacing(name) as path:
                path.write_text(text)

    def say(self, text: str) -> None:
        if self.rank.is_main:
            print(text, flush=True)
            with (self.run.folder / "log.txt").open("a") as file:
                file.write(text + "\n")

    def step(self, step: Step) -> None:
        """Count `step`; when the window is full, write its mean loss over all ranks."""
        window = self.window
        window.loss, window.steps, window.pairs = window.loss + step.loss, window.steps + 1, window.pairs + step.pairs
        if (step.step + 1) % self.every:
            return
        loss = (all_reduce_sum(window.loss) / window.steps / self.rank.world_size).item()
        seconds = time.perf_counter() - window.started
        rate = window.pairs / seconds
        self.say(
            f"epoch {step.epoch + 1:>2}/{self.epochs}  step {step.step + 1:>4}/{self.steps_per_epoch}"
            f"  loss {loss:.4f}  lr {step.lr:.1e}  {rate:,.0f} questions/s"
        )
        self._write(
            step=step.epoch * self.steps_per_epoch + step.step + 1,
            epoch=step.epoch + 1,
            loss=loss,
            lr=step.lr,
            grad_norm=step.norm.item(),
            questions_per_second=rate,
            step_seconds=seconds / window.steps,
        )
        self.window = _Window()

    def epoch(self, epoch: int, score: float, better: bool) -> None:
        """Write the validation `score` (0 to 1) of `epoch`, and whether there was none `better` before."""
        seconds = self.seconds
        left = seconds / (epoch + 1) * (self.epochs - epoch - 1)
        self.say(
            f"epoch {epoch + 1:>2}  validation {100 * score:.2f} %{' (best)' if better else ''}"
            f"  {seconds:.0f} s, {left:.0f} s to go"
        )
        self._write(step=(epoch + 1) * self.steps_per_epoch, epoch=epoch + 1, validation=100 * score, seconds=seconds)
        self.window = _Window()

    def _write(self, **row: float) -> None:
        if self.rank.is_main:
            self.run.log_metrics(**row)
