"""What is measured: every metric, engine and kind of measurement, named once, and the row that holds a figure.

A row of results.csv says which run gave it (profile, run, kind, dataset, model, fusion, world_size, seed), which
variant within that run (arm, precision, engine), and the figure itself (metric, value, low, high, unit, split).
"""

import difflib
from dataclasses import asdict, dataclass
from typing import NamedTuple

EAGER, COMPILED, PT2E, ONNX_RUNTIME = "eager", "compiled", "PT2E", "ONNX Runtime"
ENGINES = {
    EAGER: "PyTorch, one operation after the other",
    COMPILED: "PyTorch, compiled by TorchInductor",
    PT2E: "PyTorch, quantized by PT2E and compiled",
    ONNX_RUNTIME: "ONNX Runtime, which needs no PyTorch",
}

KINDS = {
    "training": "a model that learned to answer questions, by itself or from a teacher",
    "alignment": "two towers that learned which caption belongs to which image",
    "overfit": "one batch, again and again: a model that cannot learn it by heart has a defect",
    "grouping": "the study's batches against the same pairs with images and questions repeated",
    "precision": "fp32 and bf16 autocast, each with and without gradient checkpointing",
    "breakdown": "where the time of one training step goes",
    "sharing": "the fusion alone: an image's keys and values projected once, against once a pair",
    "costs": "several models side by side: operations, memory, speed of training and of answering",
    "full_size": "memory of a step with the public full-size towers, of which no accuracy is claimed",
    "attention": "where a trained cross-attention model looks, for some right and some wrong answers",
    "caching": "a distillation step with cached targets, and with the teacher beside it, against a plain step",
    "understanding": "agreement, swaps, calibration, robustness and CKA of trained models beside their teacher",
    "parity": "the same training on several ranks against one: losses, first gradient, images, answers",
    "speed": "training steps on 1, 2, … ranks in turn, and options of DDP one at a time",
    "loops": "this study's loop against transformers.Trainer, a bare loop, and itself with one change",
    "quantization": "a trained model's int8 file against its fp32 one: answers, bytes, time",
    "cross_check": "the same model compiled by PyTorch, in fp32 and int8, against ONNX Runtime's int8",
    "sensitivity": "which layers int8 changes most, and how many images calibrate it",
    "latency": "models with random weights, usually of full size: time, throughput, memory, cold start",
    "latency_compiled": "as latency, with compiled models among the arms",
    "quantization_aware": "3-bit weights before and after quantization-aware fine-tuning",
    "forensics": "alignment with one fault of the earlier study at a time, on 1, 2 and 4 simulated ranks",
}


class Metric(NamedTuple):
    unit: str
    sentence: str


METRICS = {
    # what is answered
    "accuracy": Metric("%", "questions answered rightly; by ten people's answers where the data has them"),
    "accuracy_blind": Metric("%", "accuracy of the commonest training answer to the same words, image unseen"),
    "accuracy_minus_blind": Metric("points", "accuracy above the image-blind baseline on the same questions"),
    "accuracy_written": Metric("%", "accuracy of answers that a decoder writes freely, not chosen from the list"),
    "relational_accuracy": Metric("%", "accuracy on the questions that relate objects to each other"),
    "non_relational_accuracy": Metric("%", "accuracy on all other questions"),
    "agreement": Metric("%", "questions that two models answer alike: a student and its teacher, int8 and fp32"),
    "agreement_with_onnx_runtime": Metric("%", "questions answered as by the int8 file in ONNX Runtime"),
    "retained_accuracy": Metric("%", "a student's accuracy in percent of its teacher's"),
    "accuracy_drop": Metric("points", "accuracy that coarser weights lose to fp32 on the same questions"),
    "accuracy_drop_int8": Metric("points", "accuracy that int8 loses to fp32 on the same questions"),
    "kl_divergence": Metric("nats", "how far int8 moves the answers' probabilities from fp32, mean over questions"),
    "calibration_error": Metric("points", "expected difference of confidence and accuracy"),
    "image_swap_changed": Metric("%", "answers that change when the image is swapped and they must"),
    "image_swap_kept": Metric("%", "answers that stay when the image is swapped and they must"),
    "question_swap_changed": Metric("%", "answers that change when the question is swapped and they must"),
    "question_swap_kept": Metric("%", "answers that stay when the question is swapped and they must"),
    "cka_image": Metric("", "likeness of two image towers' summaries, 0 to 1 (linear CKA)"),
    "cka_text": Metric("", "likeness of two text towers' summaries, 0 to 1 (linear CKA)"),
    "wrong_answers_shown": Metric("count", "wrong answers among those whose attention is drawn"),
    # what is retrieved
    "recall_at_1_image_to_caption": Metric("%", "images whose nearest caption is right"),
    "recall_at_1_caption_to_image": Metric("%", "captions whose nearest image is right"),
    "recall_at_5_image_to_caption": Metric("%", "images with a right caption among the five nearest"),
    "recall_at_5_caption_to_image": Metric("%", "captions with a right image among the five nearest"),
    "r_precision_image_to_caption": Metric("%", "right captions among the R nearest to an image that has R"),
    "r_precision_caption_to_image": Metric("%", "right images among the R nearest to a caption that has R"),
    "r_precision": Metric("%", "R-precision, mean of both directions"),
    # what is learned
    "overfit_first_loss": Metric("nats", "loss on one batch before it is learned by heart"),
    "overfit_last_loss": Metric("nats", "loss on one batch after it was learned by heart"),
    "overfit_accuracy": Metric("%", "accuracy on one batch after it was learned by heart"),
    "final_loss": Metric("nats", "mean training loss of the last epoch"),
    "loss_max_relative_difference": Metric("ratio", "largest difference of the loss from one rank's, over the steps"),
    "gradient_relative_difference": Metric("ratio", "distance of the first gradient from one rank's, over its length"),
    "steps_with_other_images": Metric("count", "steps in which the ranks together met other images than one rank"),
    "questions_answered": Metric("count", "test questions answered"),
    "questions_right": Metric("count", "test questions answered rightly"),
    "questions_answered_difference": Metric("count", "test questions answered more than on one rank"),
    "questions_right_difference": Metric("count", "test questions answered rightly more than on one rank"),
    "reported_loss": Metric("nats", "loss of the last epoch as a log would show it"),
    "yardstick_loss": Metric("nats", "loss among 16 validation images of distinct captions: one measure for all"),
    "last_batch_spread": Metric("%", "how far rank 0's single batches lie apart, of the earlier table's spread"),
    # what it costs
    "parameters": Metric("count", "trained numbers of the model"),
    "bytes_on_disk": Metric("bytes", "size of the file of weights"),
    "flops_per_question": Metric("flop", "operations to answer one question"),
    "int8_kernels": Metric("count", "operations that run on int8 numbers"),
    "peak_memory_bytes": Metric("bytes", "most memory held at one time during a step, beyond what was held before"),
    "process_peak_memory_bytes": Metric("bytes", "most memory that the whole process held"),
    "step_seconds": Metric("s", "one training step, batch included"),
    "part_seconds": Metric("s", "one part (arm) of a training step"),
    "predicted_step_seconds": Metric("s", "a training step as the model of computing and exchange has it"),
    "training_seconds": Metric("s", "the whole training, validation included"),
    "compile_seconds": Metric("s", "time to compile the model"),
    "cold_start_seconds": Metric("s", "from the start of a process to its end after one answer"),
    "latency_p50_ms": Metric("ms", "time of one answer, median"),
    "latency_p95_ms": Metric("ms", "time of one answer, 95th percentile"),
    "questions_per_second": Metric("1/s", "questions answered, or trained on, a second"),
    "training_questions_per_second": Metric("1/s", "questions trained on a second"),
    "exchange_bytes_per_second": Metric("B/s", "gradient that otherwise idle ranks exchange a second"),
    "overlap_share": Metric("%", "part of the gradient exchange during which the backward pass computes"),
    "checkpoint_share": Metric("ratio", "part of training time that writing checkpoints took"),
    "exported": Metric("", "1 if torch.export takes the model, 0 if it refuses"),
    "logits_max_difference": Metric("logit", "largest difference of two ways to compute the same answers"),
    # one cost over another
    "scaling_efficiency": Metric("ratio", "speed on n ranks over n times the speed on one"),
    "measured_over_predicted_ratio": Metric("ratio", "measured step time over the predicted one"),
    "step_time_ratio": Metric("ratio", "step time with one change over the unchanged step's"),
    "grouped_over_pairwise_ratio": Metric("ratio", "speed of grouped batches over pair by pair"),
    "shared_over_per_pair_ratio": Metric("ratio", "speed with an image's keys shared over once a pair"),
    "cached_over_plain_step_ratio": Metric("ratio", "distillation step with cached targets over a plain step"),
    "online_over_plain_step_ratio": Metric("ratio", "step with the teacher's forward pass in it over a plain step"),
    "loop_over_trainer_ratio": Metric("ratio", "speed of this study's loop over transformers.Trainer's"),
    "loop_over_pairwise_ratio": Metric("ratio", "speed of this study's loop over the same fed pair by pair"),
    "loop_over_bare_loop_ratio": Metric("ratio", "speed of this study's loop over the fewest lines that train"),
    "real_over_synthetic_ratio": Metric("ratio", "speed of this study's loop over the same on batches in memory"),
    "pt2e_over_onnx_runtime_latency_ratio": Metric("ratio", "latency under PT2E over that in ONNX Runtime, int8"),
    "teacher_over_student_latency_ratio": Metric("ratio", "latency of the teacher over the student's, one engine"),
    "teacher_eager_over_student_int8_latency_ratio": Metric("ratio", "teacher in PyTorch over student in int8"),
    "teacher_int8_over_student_int8_latency_ratio": Metric("ratio", "teacher in int8 over student in int8"),
    "student_best_fp32_over_student_int8_latency_ratio": Metric("ratio", "student's best fp32 over its int8"),
    "teacher_over_student_int8_bytes_ratio": Metric("ratio", "bytes of the teacher in fp32 over the student's int8"),
}
BY_QUESTION_TYPE = ("accuracy_drop_int8", "accuracy")  # these are also given for each question type by itself


def accuracy_of(question_type: str, metric: str = "accuracy") -> str:
    """The name of `metric` (one of BY_QUESTION_TYPE) on the questions of one type alone."""
    return f"{metric}_{question_type}"


def unit_of(metric: str) -> str:
    """The unit of `metric`. Raises KeyError with the nearest name for one that is not described here."""
    if metric in METRICS:
        return METRICS[metric].unit
    for whole in BY_QUESTION_TYPE:
        if metric.startswith(f"{whole}_"):
            return METRICS[whole].unit
    near = difflib.get_close_matches(metric, METRICS, n=1)
    raise KeyError(f"no metric {metric!r} in results.METRICS" + (f"; did you mean {near[0]}?" if near else ""))


@dataclass(frozen=True)
class Result:
    """One figure of a run. `low` and `high` bound its 95 % interval, in the unit of `metric`.

    `arm` says which variant within the measurement it belongs to. What is None is as the run's configuration says.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    split: str = ""
    arm: str = ""
    model: str | None = None  # teacher | student | distilled
    fusion: str | None = None
    precision: str | None = None  # fp32 | bf16 | int8 | int3
    engine: str | None = None
    world_size: int | None = None

    def __post_init__(self) -> None:
        unit_of(self.metric)
        if self.engine is not None and self.engine not in ENGINES:
            raise KeyError(f"no engine {self.engine!r} in results.ENGINES: {', '.join(ENGINES)}")

    @property
    def unit(self) -> str:
        return unit_of(self.metric)

    def as_row(self) -> dict:
        """What results.json keeps: all that is said, and the unit."""
        return {name: value for name, value in asdict(self).items() if value is not None} | {"unit": self.unit}

    @classmethod
    def from_row(cls, row: dict) -> "Result":
        return cls(**{name: value for name, value in row.items() if name != "unit"})


# What measurements and the figures drawn from them share, so that drawing needs nothing that trains.

PARITY_STEPS = 50  # loss curves of several world sizes are compared over the first so many steps
TOLERANCE = 1e-3  # allowed difference of these curves, relative
ALLOWED_DROP = 0.3  # points of accuracy that quantization may lose

DISTORTIONS = {  # arm -> what is done to the test images, and how much of it
    "noise 16": ("noise", 16),  # standard deviation, of 255
    "noise 32": ("noise", 32),
    "noise 64": ("noise", 64),
    "blur 1": ("blur", 1),  # standard deviation, in pixels
    "blur 2": ("blur", 2),
    "blur 4": ("blur", 4),
}

EARLIER = {1: 0.52, 2: 1.44, 4: 0.098}  # the earlier study's final losses by number of GPUs, as published
SOUND, EARLIER_RECIPE = "none", "all that bear on its table"  # arms of forensics: no fault, and all of them
TAUGHT, UNTAUGHT = "none, distilled", "teacher untrained, in train mode"  # arms with a teacher, trained and not
