"""Answers one question in a process of its own, to measure a cold start. Imports no more than `ask` does.

    python -m vqa.experiments.ask_once FOLDER PRECISION IMAGE QUESTION

FOLDER is a run folder, served by PyTorch, or a deployment folder, whose file of that PRECISION ONNX Runtime serves.
The last line is the most memory that the process held, in KiB, as Linux counts it.
"""

import sys
from pathlib import Path

from vqa.deployment import ask


def main() -> None:
    folder, precision, image, question = sys.argv[1:]
    place = Path(folder)
    answerer = ask.from_run(place) if (place / "model").is_dir() else ask.from_deployment(place, precision)
    ask.answer_one(answerer, (Path(image), question))
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
