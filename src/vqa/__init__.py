"""A reproducible study of visual question answering: teacher, student, scale, size."""

import ctypes
import logging
import os
import signal
import warnings
from contextlib import suppress

AGENT = "VQA_AGENT_PID"  # the environment variable in which launch tells its ranks which process is their torchrun
PR_SET_PDEATHSIG = 1  # of Linux's prctl

# tqdm, which a library imports, asks for a widget package; progress here is plain text.
warnings.filterwarnings("ignore", message="IProgress not found")

# transformers imports torchao wherever it is installed, and torchao calls what this PyTorch deprecates.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def die_with_parent() -> None:
    """Have Linux end this process when its parent ends, however that happens: no rank outlives its torchrun.

    If the torchrun that started this rank is gone already, the rank ends at once.
    """
    with suppress(OSError, AttributeError):  # another system than Linux: torchrun's own clean-up has to do
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "RANK" in os.environ and os.environ.pop(AGENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # what a rank itself starts does not inherit AGENT: that has another parent


if "RANK" in os.environ:  # now, as a rank spends seconds on imports and its torchrun may be killed meanwhile
    die_with_parent()
