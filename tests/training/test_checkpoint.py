import errno
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from vqa.training import checkpoint
from vqa.training.checkpoint import CheckpointError, damage, newest, remove_all, save, steps

FINGERPRINT = {"configuration": "abc", "data": "def"}


def network(value: float) -> nn.Linear:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.fixture
def three(tmp_path):
    """A folder in which steps 1, 2 and 10 were saved, the best model found before the last of them."""
    for step in (1, 2):
        save(tmp_path, step, network(step), {"step": step}, FINGERPRINT)
    (tmp_path / checkpoint.BEST).write_bytes(b"best before step 10")
    save(tmp_path, 10, network(10), {"step": 10, "moment": torch.arange(3.0)}, FINGERPRINT)
    return tmp_path


def found(folder, fingerprint=FINGERPRINT):
    return newest(folder, fingerprint)


def test_the_last_two_are_kept_and_give_back_what_was_saved(three):
    assert [path.name for path in steps(three)] == ["step-2", "step-10"]
    path, said = found(three)
    layer = network(0)
    state = checkpoint.load(path, layer)
    assert path.name == "step-10" and said == []
    assert layer.weight.unique().tolist() == [10] and state["step"] == 10
    assert state["moment"].equal(torch.arange(3.0))


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.MANIFEST, checkpoint.BEST])
@pytest.mark.parametrize("spoil", ["empty", "half", "last byte", "one bit", "gone"])
def test_a_damaged_one_is_named_and_passed_over(three, name, spoil):
    path = three / "step-10" / name
    whole = path.read_bytes()
    path.unlink()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    left = {"empty": b"", "half": whole[:middle], "last byte": whole[:-1], "one bit": flipped}
    if spoil != "gone":
        path.write_bytes(left[spoil])
    chosen, (said,) = found(three)
    assert chosen.name == "step-2"
    assert said.startswith(f"checkpoint step-10 is damaged ({name} ")


def test_every_bit_of_the_manifest_counts(three):
    """A changed fingerprint must look like damage, not like other data."""
    path = three / "step-10" / checkpoint.MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert damage(three / "step-10"), whole[max(place - 20, 0) : place + 20]


def test_when_all_are_damaged_there_is_none(three):
    for path in steps(three):
        (path / checkpoint.WEIGHTS).write_bytes(b"")
    chosen, said = found(three)
    assert chosen is None and len(said) == 2
    assert not (three / checkpoint.BEST).exists()  # of weights that nothing goes on from


@pytest.mark.parametrize("what", FINGERPRINT)
def test_other_data_or_another_configuration_is_refused(three, what):
    with pytest.raises(
        CheckpointError, match=rf"step-10 belongs to {what} {FINGERPRINT[what]}, not xyz: remove .*anew$"
    ):
        found(three, FINGERPRINT | {what: "xyz"})


def test_the_best_weights_become_those_of_the_checkpoint(three):
    """A kill can come after a better model was kept and before the checkpoint that says so."""
    (three / "later").write_bytes(b"better, after step 10")
    os.replace(three / "later", three / checkpoint.BEST)
    found(three)
    assert (three / checkpoint.BEST).read_bytes() == b"best before step 10"
    (three / "step-10" / checkpoint.WEIGHTS).unlink()
    found(three)  # step 2 comes from before any validation
    assert not (three / checkpoint.BEST).exists()


def test_what_a_killed_process_left_half_written_is_removed(three):
    (three / ".step-12").mkdir()
    (three / ".step-12" / checkpoint.WEIGHTS).write_bytes(b"half")
    assert found(three)[0].name == "step-10"
    assert not list(three.glob(".*"))


def test_one_step_can_be_saved_again(three):
    save(three, 10, network(11), {"step": 10}, FINGERPRINT)
    layer = network(0)
    checkpoint.load(found(three)[0], layer)
    assert layer.weight.unique().tolist() == [11] and len(steps(three)) == 2


def test_a_finished_run_keeps_only_its_best(three):
    remove_all(three)
    assert [path.name for path in three.iterdir()] == [checkpoint.BEST]


def test_tied_weights_are_saved(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save(tmp_path, 1, tied, {}, FINGERPRINT)
    assert damage(tmp_path / "step-1") is None


FULL = """
import resource, sys
from pathlib import Path
from torch import nn
from vqa.training.checkpoint import CheckpointError, save
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save(Path(sys.argv[1]), 11, nn.Linear(300, 20), {"moment": list(range(9000))}, {})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("room", [100, 26_000])  # the first file does not fit; the second does not
def test_a_full_disk_is_one_sentence_and_leaves_the_others_as_they_were(three, room):
    before = {path: checkpoint.sha256(path) for path in three.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", FULL, str(three), str(room)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    reason = os.strerror(errno.EFBIG)
    assert said.startswith(f"cannot write {three / 'step-11'}: ") and reason in said and "\n" not in said
    assert said.endswith("make room, then start again")
    assert {path: checkpoint.sha256(path) for path in three.rglob("*") if path.is_file()} == before
