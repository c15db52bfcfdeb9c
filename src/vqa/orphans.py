"""No rank outlives the torchrun that started it. Imports nothing slow: the package calls it first."""

import ctypes
import os
import signal
from contextlib import suppress

AGENT = "VQA_AGENT_PID"  # set by launch


def die_with_parent() -> None:
    """Have Linux end this process when its parent ends, however that happens: no orphans.

    If the torchrun that started this rank (its pid is in AGENT where `launch` started that) is gone
    by now, the rank ends at once.
    """
    PR_SET_PDEATHSIG = 1
    with suppress(OSError, AttributeError):  # another system than Linux: torchrun's own clean-up has to do
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "RANK" in os.environ and os.environ.pop(AGENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # what a rank itself starts does not inherit AGENT: that has another parent
