"""VQA v2 on a small data set in the official files, from archives to a trained model's soft accuracy."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vqa import run_folder as runs
from vqa.config import ConfigError, load_profile
from vqa.data import source as sources
from vqa.data import vqa_v2
from vqa.data.source import SourceError
from vqa.run_folder import Run
from vqa.training import train as training

IMAGES = {"train2014": range(100, 124), "val2014": range(500, 506)}  # COCO's numbers
SIZES = [(64, 48), (48, 64), (300, 200), (224, 224), (31, 77)]
GREY, LYING, SIDE = 101, 102, 96


def picture(image_id: int) -> Image.Image:
    """Red to the right, green to the bottom, blue by number; of another size than its neighbours."""
    width, height = SIZES[image_id % len(SIZES)]
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(down, image_id)], -1).astype(np.uint8))


def answers_of(image_id: int, number: int) -> list[str]:
    """Ten people's: yes or no, a number word or a digit, a colour; the commonest comes first."""
    commonest = ("yes" if image_id % 2 else "no", "2", "red" if image_id != 100 else "vermilion")[number]
    others = ("yes", "two", "dark red")[number]
    return [commonest] * 6 + [others] * (image_id % 4) + ["i don't know"] * (4 - image_id % 4)


def write_official(root: Path) -> None:
    """The official files, with three questions an image and two captions of each training image."""
    texts = ("Is there a dog?", "How many dogs are on the left?", "What color is the dog?")
    kinds, first_words = ("yes/no", "number", "other"), ("is there a", "how many", "what color is the")
    for split, numbers in IMAGES.items():
        (root / split).mkdir(parents=True)
        questions, annotations = [], []
        for image_id in numbers:
            path = root / split / f"COCO_{split}_{image_id:012d}.jpg"
            image, exif = picture(image_id), Image.Exif()
            if image_id == GREY:
                image = image.convert("L")
            if image_id == LYING:
                image, exif[0x0112] = image.rotate(90, expand=True), 6
            image.save(path, quality=95, exif=exif)
            for number, (text, kind, words) in enumerate(zip(texts, kinds, first_words, strict=True)):
                question_id, given = 1000 * image_id + number, answers_of(image_id, number)
                questions.append({"image_id": image_id, "question": text, "question_id": question_id})
                said = [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(given, 1)
                ]
                annotations.append(
                    {"question_type": words, "multiple_choice_answer": given[0], "answers": said}
                    | {"image_id": image_id, "answer_type": kind, "question_id": question_id}
                )
        header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
        asked = header | {"task_type": "Open-Ended", "questions": questions[::-1]}  # in no order, as the official
        (root / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(asked))
        said = header | {"annotations": annotations}
        (root / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(said))
    captions = [
        {"image_id": image_id, "id": 10 * image_id + n, "caption": f" A dog,\nnumber {image_id}, seen {n} times. "}
        for image_id in IMAGES["train2014"]
        for n in (2, 1)
    ]
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_train2014.json").write_text(json.dumps({"annotations": captions}))


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("official")
    write_official(root)
    return root


@pytest.fixture(scope="module")
def tables(official, tmp_path_factory):
    return vqa_v2.build(tmp_path_factory.mktemp("scratch"), official, SIDE)


@pytest.fixture
def copy(official, tmp_path) -> Path:
    """The official files, to do harm to."""
    return Path(shutil.copytree(official, tmp_path / "copy"))


@pytest.fixture(scope="module")
def profile(official):
    """As a user would have it, with towers of a few thousand weights."""
    tiny = {"width": 32, "layers": 1, "heads": 2}
    changes = {
        "models.teacher": {
            "image_encoder": {"kind": "vit", "patch_size": 16} | tiny,
            "text_encoder": {"kind": "bert"} | tiny,
            "fusion": {"kind": "concat", "width": 32},
        },
        "launch": {"world_size": 1, "device": "cpu", "threads_per_rank": 1},
        "data": {"source": "vqa_v2", "root": str(official), "validation_images": 4, "flips": False, "image_size": 64},
        "alignment": {"teacher": {"epochs": 1, "global_batch_size": 10}},
        "train.teacher": {"epochs": 2, "global_batch_size": 10},
    }
    return load_profile("default", changes)


def test_the_table_holds_what_the_files_say(tables):
    for split, numbers in (("train", IMAGES["train2014"]), ("test", IMAGES["val2014"])):
        frame = tables[split].questions.sort_values("question_id")
        assert tables[split].image_ids.tolist() == list(numbers)
        expected = [(image_id, n) for image_id in numbers for n in range(3)]
        assert frame["question_id"].tolist() == [1000 * image_id + n for image_id, n in expected]
        assert [list(given) for given in frame["answers"]] == [answers_of(*each) for each in expected]
        assert frame["answer"].tolist() == [answers_of(*each)[0] for each in expected]
        assert frame["question_type"].tolist() == ["yes_no", "number", "other"] * len(numbers)
    assert tables["train"].captions[3] == [f"A dog, number 103, seen {n} times." for n in (1, 2)]
    assert not any(tables["test"].captions)


def test_every_image_is_a_square_of_the_same_size_upright_and_in_colour(tables):
    """Against the picture before JPEG: 255 levels, of which its compression costs a few."""
    images = tables["train"].pixels(np.arange(24))
    assert images.shape == (24, 3, SIDE, SIDE)
    for image_id, image in zip(IMAGES["train2014"], images, strict=True):
        before = picture(image_id).convert("L").convert("RGB") if image_id == GREY else picture(image_id)
        expected = np.asarray(before.resize((SIDE,) * 2, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(image.astype(int) - expected).mean() < 4, image_id


def test_a_table_is_written_with_few_rows_in_memory(tmp_path):
    """When row 500 is made, rows written long before are gone."""
    import weakref

    class Row(np.ndarray):
        pass

    alive: list[weakref.ref] = []
    most = 0

    def rows():
        nonlocal most
        for number in range(600):
            image = np.zeros((3, 8, 8), np.uint8).view(Row)
            alive.append(weakref.ref(image))
            yield {name: [] for name in features} | {"image_id": number, "image": image}
            del image
            if number % 50 == 0:
                most = max(most, sum(each() is not None for each in alive))

    features = sources.image_features(8)
    assert len(sources.write_table(rows(), features, tmp_path / "t.arrow")) == 600
    assert most < 250


def test_splits_are_official_and_held_out_by_image(profile):
    source = sources.load(profile.data)
    ids = {name: set(table.image_ids) for name, table in source.splits.items()}
    assert ids["test"] == set(IMAGES["val2014"]) and ids["train"] | ids["validation"] == set(IMAGES["train2014"])
    assert len(ids["validation"]) == 4 and not ids["train"] & ids["validation"]


def test_answers_given_nine_times_make_the_vocabulary(profile):
    source = sources.load(profile.data)
    counted = Counter(source.splits["train"].questions["answer"])
    assert source.answers == sorted(answer for answer, count in counted.items() if count >= 9)
    assert 0 < min(counted.values()) < 9
    with pytest.raises(ConfigError, match=r"^no answer is given 9 times: raise data.train_images$"):
        _ = sources.load(profile.data.model_copy(update={"train_images": 2})).answers


def test_a_selection_of_captions_or_questions_copies_no_images(profile):
    """Their images lie at the addresses of the mapped file, and no file was added to it."""
    source = sources.load(profile.data)
    files, train = sorted(sources.RUNS.glob("data/vqa_v2-*/**/*")), source.splits["train"]
    captioned, fewer = train.captioned(), train.thinned(0.4, seed=0)
    assert captioned.images is fewer.images is train.images
    mapped = train.images.data.table.column("image").chunks
    addresses = [chunk.storage.flatten().flatten().flatten().buffers()[1].address for chunk in mapped]
    assert train._mapped[0].ctypes.data == addresses[0] and train._mapped[-1].base is not None
    assert sorted(sources.RUNS.glob("data/vqa_v2-*/**/*")) == files
    expected = [f"A dog, number {image_id}, seen {n} times." for image_id in train.image_ids for n in (1, 2)]
    assert captioned.questions["question"].tolist() == expected
    assert len(fewer.questions) == len(train) and set(fewer.questions["question_id"]) < set(
        train.questions["question_id"]
    )


def test_training_on_it_from_captions_to_soft_accuracy(profile, one_rank, tmp_path, monkeypatch):
    """End to end in this process; scores are recomputed from the file of predictions by an independent rule."""
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    config = profile.run("teacher")
    for each in (config.parent, config):
        run = Run(each)
        with run.writing():
            training.train(each, run, one_rank)
    records = run.predictions().query("split == 'test'")
    assert len(records) == 18 and set(records["prediction"]) <= {"yes", "no", "2", "red"}
    for row in records.itertuples():
        same = Counter("2" if answer == "two" else answer for answer in row.answers)[row.prediction]
        assert row.correct == pytest.approx(min(0.3 * same, 1) if same < 4 else 1)  # 0, .3, .6, .9, 1
    assert run.result("accuracy").value == pytest.approx(100 * records["correct"].mean())
    assert run.result("accuracy_yes_no").value == pytest.approx(
        100 * records.loc[records["question_type"] == "yes_no", "correct"].mean()
    )
    assert 0 < run.result("accuracy_blind").value < 100  # "2" and "red" need no image, "yes" or "no" does


def test_a_folder_that_lacks_files_is_told_which_and_where_to_get_them(copy):
    (copy / "v2_mscoco_val2014_annotations.json").unlink()
    shutil.rmtree(copy / "train2014")
    with pytest.raises(SourceError) as caught:
        vqa_v2.fingerprint(copy, SIDE)
    said = str(caught.value)
    assert said.startswith(f"{copy} lacks train2014, v2_mscoco_val2014_annotations.json: ") and "\n" not in said
    assert "https://visualqa.org/download.html" in said and f"python -m vqa.data.vqa_v2 {copy}" in said


def test_the_fingerprint_knows_every_file(copy):
    def after(change) -> str:
        change()
        return vqa_v2.fingerprint(copy, SIDE)

    image = copy / "val2014" / "COCO_val2014_000000000500.jpg"
    captions = copy / "annotations" / "captions_train2014.json"
    questions = copy / "v2_OpenEnded_mscoco_train2014_questions.json"
    whole = vqa_v2.fingerprint(copy, SIDE)
    (image.parent / ".DS_Store").write_text("what macOS leaves where somebody looked")
    (image.parent / f"._{image.name}").write_text("the same")
    assert vqa_v2.fingerprint(copy, SIDE) == whole != vqa_v2.fingerprint(copy, SIDE + 1)
    changes = [
        lambda: image.write_bytes(image.read_bytes()[:-1]),
        image.unlink,
        lambda: captions.write_text(captions.read_text().replace("dog", "cat")),
        lambda: questions.write_text(questions.read_text().replace("dog", "cat")),
    ]
    assert len({whole, *map(after, changes)}) == 5


@pytest.mark.parametrize("content", ["{", '{"questions": [{"question": "why?"}]}', "[1]"])
def test_questions_in_another_form_are_refused_by_name(copy, content, tmp_path):
    (copy / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(content)
    with pytest.raises(SourceError, match=r"v2_OpenEnded_mscoco_train2014_questions\.json ") as caught:
        vqa_v2.build(tmp_path, copy, SIDE)
    assert "\n" not in str(caught.value)


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "edit", "sentence"),
    [
        (
            "v2_OpenEnded_mscoco_train2014_questions.json",
            lambda content: content["questions"].append(content["questions"][0]),
            r"questions\.json has question_id 123002 twice: unpack it again$",
        ),
        (
            "v2_mscoco_train2014_annotations.json",
            lambda content: content["annotations"].append(content["annotations"][5]),
            r"annotations\.json has question_id 101002 twice: unpack it again$",
        ),
        (
            "v2_mscoco_train2014_annotations.json",
            lambda content: content["annotations"].pop(4) and content["annotations"].pop(0),
            r"annotations\.json has no answers to 2 of the 72 questions in .*questions\.json \(the first is "
            r"question_id 101001\): unpack both again$",
        ),
        (
            "v2_mscoco_train2014_annotations.json",
            lambda content: content["annotations"][7].update(multiple_choice_answer=None),
            r"annotations\.json is not in the official form: TypeError\('None is no text'\)$",
        ),
    ],
    ids=["question twice", "annotation twice", "no annotation", "no answer"],
)
def test_questions_and_annotations_that_do_not_go_together_are_refused(copy, tmp_path, name, edit, sentence):
    change(copy / name, edit)
    with pytest.raises(SourceError, match=sentence):
        vqa_v2.build(tmp_path, copy, SIDE)


def test_a_numeric_answer_is_its_digits_and_changes_no_other(copy, tables, tmp_path, monkeypatch):
    """As text in the table that is kept, too, where other answers of the ten are words."""

    def edit(content):
        annotation = content["annotations"][1]
        annotation["multiple_choice_answer"] = 2
        annotation["answers"][0]["answer"] = 2

    change(copy / "v2_mscoco_train2014_annotations.json", edit)
    monkeypatch.setattr(sources, "RUNS", tmp_path / "runs")
    _, kept = sources.stored("vqa_v2", str(copy), SIDE)
    ours, before = (each["train"].questions for each in (kept, tables))
    assert [list(ten) for ten in ours["answers"]] == [list(ten) for ten in before["answers"]]
    assert ours["answer"].tolist() == before["answer"].tolist() and ours["answer"].iloc[1] == "2"


def test_bad_images_are_all_found_before_anything_is_kept(copy, tmp_path, monkeypatch, capsys):
    """A folder of the official names with seven bad files of different kinds."""
    monkeypatch.setattr(sources, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sources, "SILENT_SECONDS", 0)
    monkeypatch.setattr(sources, "READ_AT_ONCE", 5)
    path = {i: copy / "train2014" / f"COCO_train2014_{i:012d}.jpg" for i in IMAGES["train2014"]}
    path[100].unlink()
    path[104].write_bytes(path[104].read_bytes()[:-200])
    path[107].write_text("no image")
    path[110].write_bytes(b"")
    path[113].write_bytes(bytes([path[113].read_bytes()[0] ^ 1]) + path[113].read_bytes()[1:])
    Image.new("1", (9000, 9000)).save(path[116], "PNG")  # 81 million pixels in 10 kB
    path[120].unlink()
    path[120].mkdir()
    with pytest.raises(SourceError) as caught:
        sources.stored("vqa_v2", str(copy), SIDE)
    named = ", ".join(str(path[i]) for i in (100, 104, 107, 110, 113))
    assert str(caught.value).startswith(f"7 of 24 images are missing, damaged or too large ({named} …): get the ")
    assert not list((tmp_path / "runs" / "data").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("images read:  20 % (5 of 24, 2 bad), ") and lines[-1].startswith("images read: 100 %")
    assert len(lines) == 5


def test_one_command_unpacks_builds_and_does_neither_twice(official, tmp_path):
    """As a user does it, on the archives as they are offered."""
    root = tmp_path / "data"
    root.mkdir()
    for name in ("train2014", "val2014", "annotations"):
        shutil.make_archive(str(root / name), "zip", official, name)
    for path in official.glob("*.json"):
        with zipfile.ZipFile(root / f"{path.stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name)

    def command() -> str:
        arguments = [sys.executable, "-m", "vqa.data.vqa_v2", str(root)]
        environment = os.environ | {"VQA_RUNS": str(tmp_path / "runs")}
        return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout

    first = command()
    assert "train2014.zip: 24 files" in first and "24 images to train, 6 images to test" in first
    table = tmp_path / "runs" / "data" / f"vqa_v2-{vqa_v2.fingerprint(official, 224)}"
    assert [path.name for path in (tmp_path / "runs" / "data").iterdir()] == [table.name]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "train2014.zip: unpacked before" in command()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def archive(path: Path, *members: tuple[str, bytes, int]) -> Path:
    """A zip file of (name, content, kind), kind as in a mode of stat."""
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("good.json", "{}")
        for name, content, kind in members:
            member = zipfile.ZipInfo(name)
            member.external_attr = (kind | 0o644) << 16
            written.writestr(member, content)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/tmp/x.json", stat.S_IFREG),
        ("../x.json", stat.S_IFREG),
        ("a/../../x.json", stat.S_IFREG),
        ("..\\x.json", stat.S_IFREG),
        ("C:/x.json", stat.S_IFREG),
        ("link.json", stat.S_IFLNK),
        ("pipe.json", stat.S_IFIFO),
    ],
)
def test_an_archive_that_reaches_outside_is_refused_whole(tmp_path, name, kind):
    path = archive(tmp_path / "odd.zip", (name, b"/etc/passwd", kind))
    with pytest.raises(SourceError, match=r"cannot be unpacked: it holds .*, which is no plain file below its folder$"):
        vqa_v2.unpack(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vqa_v2.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000))
    path = archive(tmp_path / "large.zip", ("zeros", b"0" * 999, stat.S_IFREG))
    with pytest.raises(SourceError, match=r"large.zip cannot be unpacked: it takes 0.0 GiB unpacked, and 0.0 GiB are"):
        vqa_v2.unpack(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def damaged(whole: bytes) -> dict[str, bytes]:
    place = whole.index(b"content")
    return {"cut": whole[: len(whole) // 2], "flipped": whole[:place] + b"C" + whole[place + 1 :], "text": b"no zip"}


@pytest.mark.parametrize("kind", ["cut", "flipped", "text"])
def test_a_damaged_archive_leaves_nothing(tmp_path, kind):
    made = io.BytesIO(archive(tmp_path / "images.zip", ("val2014/a.jpg", b"content", stat.S_IFREG)).read_bytes())
    (tmp_path / "images.zip").write_bytes(damaged(made.getvalue())[kind])
    with pytest.raises(SourceError, match=r"images.zip cannot be unpacked: "):
        vqa_v2.unpack(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images.zip"]


def test_archives_that_share_a_folder_are_unpacked_side_by_side_and_only_once(tmp_path, capsys):
    """Also beside files of the user's, and again after one file was lost."""
    archive(tmp_path / "first.zip", ("annotations/a.json", b"a", stat.S_IFREG))
    archive(tmp_path / "second.zip", ("annotations/b.json", b"b", stat.S_IFREG), ("annotations/c/d.json", b"d", 0))
    (tmp_path / "._first.zip").write_bytes(b"macOS writes such files")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "mine.txt").write_text("mine")

    def content() -> dict[str, tuple[str, int]]:
        files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".txt")]
        return {str(path.relative_to(tmp_path)): (path.read_text(), path.stat().st_mtime_ns) for path in files}

    vqa_v2.unpack(tmp_path)
    before = content()
    assert {name: text for name, (text, _) in before.items()} == {
        "good.json": "{}",
        "annotations/a.json": "a",
        "annotations/b.json": "b",
        "annotations/c/d.json": "d",
        "annotations/mine.txt": "mine",
    }
    vqa_v2.unpack(tmp_path)
    assert content() == before
    (tmp_path / "annotations" / "b.json").unlink()
    vqa_v2.unpack(tmp_path)
    assert {name: text for name, (text, _) in content().items()} == {name: text for name, (text, _) in before.items()}
    assert capsys.readouterr().out.count("unpacked before") == 3
    assert not list(tmp_path.glob(".unpacking*"))


def test_a_file_that_is_there_and_differs_is_left_as_it_is(tmp_path):
    archive(tmp_path / "images.zip", ("val2014/a.jpg", b"content", stat.S_IFREG))
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.jpg").write_text("mine")
    with pytest.raises(SourceError, match=r"val2014/a.jpg is there and differs; move it away$"):
        vqa_v2.unpack(tmp_path)
    assert (tmp_path / "val2014" / "a.jpg").read_text() == "mine" and not (tmp_path / "good.json").exists()


def test_scores_of_a_file_of_predictions_can_be_computed_again(tables, tmp_path):
    """The ten answers survive Parquet."""
    from vqa.evaluation.metrics import score

    frame = tables["test"].questions
    frame.to_parquet(tmp_path / "kept.parquet")
    again = pd.read_parquet(tmp_path / "kept.parquet")
    assert score(again["answer"], again).tolist() == score(frame["answer"], frame).tolist() == [1.0] * len(frame)
