import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from vqa import AGENT
from vqa.config import ROOT, ConfigError, LaunchConfig, load_profile, parse_overrides, save_yaml
from vqa.distributed import check_devices
from vqa.run_folder import RUNS, Run
from vqa.study.launch import launch

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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_ranks(program: str, world_size: int) -> list[str]:
    """What each rank prints that runs `program`, started as torchrun starts it."""
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
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


def test_a_host_needs_gpus_for_its_own_ranks_only(monkeypatch):
    """Eight ranks on two hosts of four GPUs, then on two of three."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    eight = LaunchConfig(world_size=8, device="cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_devices(eight)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"^torchrun's --nproc-per-node is 4 but this machine has 3 GPUs: lower it"):
        check_devices(eight)


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
from vqa import die_with_parent
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


@dataclass(frozen=True)
class Host:
    """One of two hosts: where its torchrun is to be started, and what of the network it sees."""

    number: int
    start: tuple[str, ...]  # in front of a command
    address: str
    interface: str
    port: int  # of the rendezvous, on the first host


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def joined_by_a_cable(names: list[str]) -> None:
    """Two network namespaces, each with an address of its own and no other way out than to the other."""
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
    for number, name in enumerate(names, start=1):
        ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "cable")
        for interface in ("lo", "cable"):
            ip("-n", name, "link", "set", interface, "up")


@pytest.fixture
def hosts(record_property) -> Iterator[list[Host]]:
    """Two hosts: network namespaces where the machine allows them (Linux, root), else two loopback addresses.

    Which of them it was is kept as the test's property `hosts`, and printed.
    """
    names, port = [f"vqa{os.getpid()}-{number}" for number in (1, 2)], free_port()
    try:
        joined_by_a_cable(names)
        how, start = "network namespaces", [("ip", "netns", "exec", name) for name in names]
        where = [("10.99.0.1", "cable"), ("10.99.0.2", "cable")]
    except (OSError, subprocess.CalledProcessError):
        how, start, where = "loopback addresses", [(), ()], [("127.0.0.1", "lo"), ("127.0.0.2", "lo")]
    record_property("hosts", how)
    print(f"two hosts: {how}")
    yield [Host(number, start[number], *where[number], port) for number in range(2)]
    for name in names:
        with suppress(OSError, subprocess.CalledProcessError):
            for process in ip("netns", "pids", name).split():
                psutil.Process(int(process)).kill()
            ip("netns", "delete", name)


def torchrun(host: Host, config: Path, runs: Path) -> subprocess.Popen:
    """The command that starts one of two agents with one rank each, as the README has it, on `host`."""
    rendezvous = f"is_host={1 - host.number},keep_alive_interval=2"
    return subprocess.Popen(
        [
            *host.start,
            *("sh", "-c", f'{AGENT}=$$ exec "$@"', "sh", sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", host.address),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host.address[:-1]}1:{host.port}", "--rdzv-id", "vqa"),
            *("--rdzv-conf", rendezvous, "-m", "vqa.training.train", "--config", str(config)),
        ],
        env=os.environ
        | {"VQA_RUNS": str(runs), "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1"}
        | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # else PyTorch 2.15 never tells a late agent the address
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def on_the_command_line(config: Path) -> list[psutil.Process]:
    """Agents and ranks that were given `config`."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(config) in (p.info["cmdline"] or [])]


@pytest.fixture
def shared(tmp_path, source) -> Iterator[Path]:
    """A run folder of their own for two hosts, with the data set in it; no process is left with it afterwards."""
    shutil.copytree(RUNS / "data", tmp_path / "runs" / "data")
    yield tmp_path / "runs"
    left = on_the_command_line(tmp_path / "config.yaml")
    for process in left:
        process.kill()
    assert left == []


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def losses(folder: Path) -> list[tuple[int, float]]:
    """Each logged step and its loss."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def ends(agents: list[subprocess.Popen]) -> list[str]:
    """What the agents said, all of which must end well."""
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    return said


def test_slurm_starts_one_agent_a_host_and_counts_all_ranks(tmp_path):
    """Two hosts, with a scontrol and an srun that only say what they are asked."""
    for name, line in {"scontrol": "echo node7; echo node8", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o700)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "5"}
    said = subprocess.run(
        ["bash", ROOT / "params" / "l4x4.slurm", "student", "train.student.epochs=3"],
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "torchrun --nnodes 2 --nproc-per-node 4" in said and "--rdzv-endpoint node7:29500 --rdzv-id 5" in said
    arguments, overrides = said.split(" -m vqa.training.train ")[1].split(" --set ")
    assert arguments == "--profile l4x4 --role student"
    run = load_profile("l4x4", parse_overrides(overrides.split())).run("student")
    assert run.launch.world_size == run.parent.launch.world_size == 8 and run.train.epochs == 3


def test_two_hosts_learn_the_bits_of_one_with_as_many_ranks(hosts, shared, trained, tmp_path):
    """Alignment, in which vectors travel as well as gradients."""
    alone = trained["aligned_pair"]
    save_yaml(alone.config, tmp_path / "config.yaml")
    said = ends([torchrun(host, tmp_path / "config.yaml", shared) for host in hosts])
    assert weights_hash(shared / alone.folder.name) == weights_hash(alone.folder)
    assert losses(shared / alone.folder.name) == losses(alone.folder)
    assert "loss" in said[0] and "loss" not in said[1]  # one writer, on the first host


def test_training_survives_the_loss_of_a_host(hosts, shared, tiny_profile, tmp_path):
    """The second host's agent dies with its rank, another joins; in the end the bits are those of one calm host."""
    changes = {"launch__world_size": 2, "train__epochs": 15, "train__checkpoint_every_steps": 4}
    calm = Run(tiny_profile.run("teacher", aligned=False, **changes))
    folder, config = shared / calm.folder.name, tmp_path / "config.yaml"
    save_yaml(calm.config, config)
    agents = [torchrun(host, config, shared) for host in hosts]
    end = time.monotonic() + 300
    while not any((folder / "checkpoints").glob("[!.]*/")) and time.monotonic() < end:
        time.sleep(0.05)
    agents[1].kill()
    agents[1].communicate()
    assert not (folder / "results.json").exists()
    agents[1] = torchrun(hosts[1], config, shared)
    ends(agents)
    assert "going on after step" in (folder / "log.txt").read_text()
    launch(calm)
    assert weights_hash(folder) == weights_hash(calm.folder)
    assert dict(losses(folder)) == dict(losses(calm.folder))
