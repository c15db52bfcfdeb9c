"""One trial of each kind of fault; `make faults` injects them all, many times."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

SHARE = [
    "kill -9 of a rank in an epoch",
    "SIGTERM in evaluation",
    "stopped, resumed, killed, resumed",
    "disk full at a checkpoint",
    "checkpoint with a flipped bit",
    "Inf in loss or gradient of one rank",
    "two runs in one folder",
    "output path under a file",
    "deleted image",
]


def test_a_share_of_the_faults_is_survived(tmp_path):
    """Judged in faults.py: the same bits as without the fault, or one sentence; no process left."""
    command = [sys.executable, Path(__file__).with_name("faults.py"), "--trials", "1", "--csv", tmp_path / "faults.csv"]
    done = subprocess.run([*map(str, command), "--only", *SHARE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "faults.csv")
    assert table["fault"].tolist() == SHARE and (table["survived"] == 1).all()
