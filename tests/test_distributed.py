import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch

from vqa.config import ConfigError, LaunchConfig
from vqa.distributed import check_devices

TWO_RANKS = LaunchConfig(world_size=2, device="cpu", threads_per_rank=1)

RANK = """
import json, sys, torch
from vqa.config import LaunchConfig
from vqa.distributed import all_reduce_sum, from_main, gather_objects, process_group

with process_group(LaunchConfig(world_size=2, device="cpu", threads_per_rank=1)) as rank:
    mine = torch.tensor([1.0, 10.0]) * (rank.rank + 1)
    said = {
        "rank": rank.rank,
        "is_main": rank.is_main,
        "world_size": rank.world_size,
        "threads": torch.get_num_threads(),
        "sum": all_reduce_sum(mine).tolist(),
        "mine": mine.tolist(),
        "gathered": gather_objects({"from": rank.rank}, rank),
        "main": from_main(f"said by {rank.rank}"),
    }
said["left"] = not torch.distributed.is_initialized()
print(json.dumps(said))
"""


def start_ranks(program: str, world_size: int) -> list[str]:
    """What each rank prints that runs `program`, started as torchrun starts it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    return [rank.communicate(timeout=300)[0].strip() for rank in ranks]


@pytest.fixture(scope="module")
def said() -> list[dict]:
    """What each of two ranks has to say."""
    return [json.loads(text) for text in start_ranks(RANK, 2)]


def test_ranks_know_who_they_are_and_leave_the_group(said):
    assert [(s["rank"], s["is_main"], s["world_size"]) for s in said] == [(0, True, 2), (1, False, 2)]
    assert all(s["threads"] == 1 and s["left"] for s in said)


def test_the_sum_is_everyones_and_changes_nobodys(said):
    assert [s["sum"] for s in said] == [[3.0, 30.0]] * 2
    assert [s["mine"] for s in said] == [[1.0, 10.0], [2.0, 20.0]]


def test_objects_go_to_the_main_rank_in_order_and_from_it_to_all(said):
    assert [s["gathered"] for s in said] == [[{"from": 0}, {"from": 1}], []]
    assert [s["main"] for s in said] == ["said by 0"] * 2


def test_more_ranks_than_gpus_are_refused():
    too_many = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=rf"^launch.world_size is {too_many} but this machine has {too_many - 1} "):
        check_devices(LaunchConfig(world_size=too_many, device="cuda"))
    check_devices(LaunchConfig(world_size=too_many, device="cpu"))


LATE = """
import datetime, sys, time, torch
from vqa import distributed
from vqa.config import LaunchConfig
distributed.TIMEOUT = datetime.timedelta(seconds=4)
try:
    with distributed.process_group(LaunchConfig(world_size=3, device="cpu", threads_per_rank=1)) as rank:
        if rank.rank == 1:
            time.sleep(12)
        distributed.all_reduce_sum(torch.ones(1))
except distributed.LateRank as error:
    print(error)
except RuntimeError as error:
    print("no hint")
"""


def test_a_late_rank_is_named_by_those_that_waited():
    said = start_ranks(LATE, 3)
    assert said[1] == "no hint"
    assert "rank 1 did not come within 4 s: see what holds it" in (said[0], said[2])
    assert not [text for text in said if "rank 0" in text or "rank 2" in text]


TOGETHER = """
import json, os, signal
from vqa.config import LaunchConfig
from vqa.distributed import Stopped, anyone, main_first, process_group, stop_if_asked, stoppable

with process_group(LaunchConfig(world_size=2, device="cpu", threads_per_rank=1)) as rank:
    said = {"anyone": [anyone(rank.rank == one, rank) for one in (0, 1, 2)]}
    said["given"] = main_first(lambda: f"done by {rank.rank}", rank)
    try:
        main_first(lambda: os.stat("/no/where"), rank)
    except FileNotFoundError as error:
        said["raised"] = error.filename
    with stoppable():
        for step in range(10):
            if step == 3 + rank.rank and rank.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # as from torchrun and from a cluster
            try:
                stop_if_asked(rank)
            except Stopped:
                said["stopped"] = step
                break
print(json.dumps(said))
"""


def test_what_one_rank_meets_all_ranks_know():
    """A flag of either, an error of the main rank's work, a signal at rank 1 only."""
    main, other = (json.loads(text) for text in start_ranks(TOGETHER, 2))
    for said in (main, other):
        assert said["anyone"] == [True, True, False]
        assert said["raised"] == "/no/where" and said["stopped"] == 4
    assert main["given"] == "done by 0" and other["given"] is None


IMPATIENT = """
import os, signal, time
from vqa.distributed import stoppable
with stoppable():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_a_second_signal_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", IMPATIENT], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stdout


CHILD = """
import time
from vqa.orphans import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode(), flush=True)
input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_process_dies_with_its_parent_even_when_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid, ready = parent.stdout.readline().split()
    child = psutil.Process(int(pid))
    assert ready == b"ready" and child.is_running()
    parent.kill()
    parent.communicate()
    survivors = psutil.wait_procs([child], timeout=5)[1]
    for process in survivors:
        process.kill()
    assert survivors == []
