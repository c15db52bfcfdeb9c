import json
import os
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
from vqa.distributed import all_reduce_sum, from_main, gather_objects, gather_rows, process_group

with process_group(LaunchConfig(world_size=2, device="cpu", threads_per_rank=1)) as rank:
    mine = torch.tensor([1.0, 10.0]) * (rank.rank + 1)
    rows = torch.tensor([[2.0 * rank.rank], [2.0 * rank.rank + 1]], requires_grad=True)
    every = gather_rows(rows)
    (every**2 * torch.arange(4)[:, None] * (rank.rank + 1)).sum().backward()
    said = {
        "rank": rank.rank,
        "is_main": rank.is_main,
        "world_size": rank.world_size,
        "threads": torch.get_num_threads(),
        "sum": all_reduce_sum(mine).tolist(),
        "mine": mine.tolist(),
        "gathered": gather_objects({"from": rank.rank}, rank),
        "main": from_main(f"said by {rank.rank}"),
        "rows": every.flatten().tolist(),
        "gradient": rows.grad.flatten().tolist(),
        "numbers": gather_rows(torch.tensor([rank.rank])).tolist(),
    }
said["left"] = not torch.distributed.is_initialized()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> list[dict]:
    """What each of two ranks, started as torchrun starts them, has to say."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "2"},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]


def test_ranks_know_who_they_are_and_leave_the_group(said):
    assert [(s["rank"], s["is_main"], s["world_size"]) for s in said] == [(0, True, 2), (1, False, 2)]
    assert all(s["threads"] == 1 and s["left"] for s in said)


def test_the_sum_is_everyones_and_changes_nobodys(said):
    assert [s["sum"] for s in said] == [[3.0, 30.0]] * 2
    assert [s["mine"] for s in said] == [[1.0, 10.0], [2.0, 20.0]]


def test_objects_go_to_the_main_rank_in_order_and_from_it_to_all(said):
    assert [s["gathered"] for s in said] == [[{"from": 0}, {"from": 1}], []]
    assert [s["main"] for s in said] == ["said by 0"] * 2


def test_gathered_rows_take_every_ranks_gradient_back(said):
    """The ranks' losses are k and 2k times the squares of rows 0 to 3, k = 0 to 3: together 3k x², so 6kx."""
    assert [s["rows"] for s in said] == [[0.0, 1.0, 2.0, 3.0]] * 2
    assert [s["gradient"] for s in said] == [[0.0, 6.0], [24.0, 54.0]]
    assert [s["numbers"] for s in said] == [[0, 1]] * 2


def test_more_ranks_than_gpus_are_refused():
    too_many = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=rf"^launch.world_size is {too_many} but this machine has {too_many - 1} "):
        check_devices(LaunchConfig(world_size=too_many, device="cuda"))
    check_devices(LaunchConfig(world_size=too_many, device="cpu"))


CHILD = """
import time
from vqa.distributed import die_with_parent
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
