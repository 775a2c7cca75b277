"""Folders of images: layouts, broken images, memory."""

import os
import re
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.simclr.data import ImageFolder
from experiments.simclr.program.errors import UserError
from experiments.simclr.program.output import tolerant_output


def write(path, value=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def folder(root, **arguments):
    data = ImageFolder(root=str(root), **{"batch_size": 2, "image_size": 8} | arguments)
    data.setup()
    return data


@pytest.fixture
def classes(tmp_path):
    """Class a is dark, class b is bright, ten images each."""
    for i in range(10):
        write(tmp_path / "a" / f"{i}.png", i)
        write(tmp_path / "b" / "deeper" / f"{i}.png", 200 + i)
    return tmp_path


def test_class_folders_are_labels(classes):
    (classes / "notes").mkdir()
    (classes / "notes" / "read.me").touch()
    data = folder(classes)
    assert data.class_names == ["a", "b"]
    assert [len(data.train_images), len(data.val_images), len(data.test_images)] == [16, 2, 2]
    seen = []
    for part in ("train", "val", "test"):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        assert images.shape[1:] == (3, 8, 8)
        assert labels.equal((images[:, 0, 0, 0] >= 200).long())
        seen += images[:, 0, 0, 0].tolist()
    assert sorted(seen) == [*range(10), *range(200, 210)]


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(10):
        write(tmp_path / f"{i}.JPG", i)
    data = folder(tmp_path)
    assert data.num_classes is None
    assert data.class_names is None
    assert data.train_labels is None
    assert set(next(iter(data.train_dataloader()))) == {"image", "index"}


def test_train_and_test_folders_are_the_parts(tmp_path):
    for i in range(10):
        write(tmp_path / "train" / "a" / f"{i}.png", i)
        write(tmp_path / "train" / "b" / f"{i}.png", 100 + i)
    write(tmp_path / "test" / "b" / "0.png", 250)
    data = folder(tmp_path)
    assert data.test_images.unique().tolist() == [250]
    assert data.test_labels.tolist() == [1]
    assert [len(data.train_images), len(data.val_images)] == [18, 2]
    write(tmp_path / "val" / "a" / "0.png", 240)
    data = folder(tmp_path)
    assert data.val_images.unique().tolist() == [240]
    assert len(data.train_images) == 20


def test_a_class_unknown_to_training_is_refused(tmp_path):
    for i in range(5):
        write(tmp_path / "train" / "a" / f"{i}.png")
    write(tmp_path / "test" / "c" / "0.png")
    with pytest.raises(UserError, match=r"test has classes that train/ has not: \['c'\]"):
        folder(tmp_path)


def test_what_was_understood_is_said(tmp_path, capsys):
    for i in range(12):
        write(tmp_path / "all" / "Train" / "ab"[i % 2] / f"{i}.png", i)
    write(tmp_path / "all" / "Train" / ".ipynb_checkpoints" / "0.png")
    write(tmp_path / "all" / "Test" / "b" / "0.png", 250)
    folder(tmp_path)
    said = capsys.readouterr().out
    assert said.splitlines() == [
        f"images of {tmp_path}: 2 classes",
        "  train        11 images: a 6, b 5",
        "  val           1 image, drawn from the training images: a 0, b 1",
        "  test          1 image: a 0, b 1",
        "  left out all/Train/.ipynb_checkpoints: hidden, or a system's own",
        "  looked into all/: it is the only folder of images",
    ]


def test_of_many_classes_the_first_are_named(tmp_path, capsys):
    for i in range(60):
        write(tmp_path / f"{i % 20:02}" / f"{i}.png")
    folder(tmp_path)
    train = capsys.readouterr().out.splitlines()[1]
    assert re.search(r": 00 3, 01 \d, .*11 \d, 8 more classes, of \d to 3 in all$", train)


def test_any_class_name_is_shown_whatever_the_terminal_has(tmp_path, monkeypatch):
    for i in range(10):
        write(tmp_path / os.fsdecode(b"caf\xe9") / f"{i}.png", i)
        write(tmp_path / "日本\nü" / f"{i}.png", 100 + i)
    terminal = tmp_path / "terminal"
    with terminal.open("w", encoding="ascii") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with tolerant_output():
            data = folder(tmp_path)
    assert data.class_names == [r"caf\xe9", r"日本\nü"]
    said = terminal.read_text(encoding="ascii")
    assert re.search(r": caf\\xe9 \d, \\u65e5\\u672c\\n\\xfc \d", said)


def test_images_are_cropped_about_their_centre_and_turned_upright(tmp_path):
    picture = np.zeros((10, 30, 3), dtype=np.uint8)
    picture[:, 10:20] = 200  # the middle third is bright
    picture[:5, 10:20] = 100  # and its upper half less so
    for i in range(4):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # stored upside down
    Image.fromarray(picture[::-1, ::-1].copy()).save(tmp_path / "4.png", exif=turned)
    data = folder(tmp_path, batch_size=1, image_size=10)
    expected = torch.full((3, 10, 10), 200, dtype=torch.uint8)
    expected[:, :5] = 100
    images = torch.cat([data.train_images, data.val_images, data.test_images])
    assert len(images) == 5
    assert images.equal(expected.expand(5, -1, -1, -1))


def test_a_broken_image_is_left_out_and_named(classes):
    whole = (classes / "a" / "3.png").read_bytes()
    (classes / "a" / "3.png").write_bytes(whole[: len(whole) // 2])
    (classes / "b" / "junk.jpg").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="left out") as warned:
        data = folder(classes)
    messages = [str(warning.message) for warning in warned]
    assert any("3.png" in message for message in messages)
    assert any("junk.jpg" in message for message in messages)
    assert any("left out 2 of 21 images" in message for message in messages)
    parts = [data.train_images, data.val_images, data.test_images]
    values = torch.cat(parts)[:, 0, 0, 0].tolist()
    assert sorted(values) == [0, 1, 2, 4, 5, 6, 7, 8, 9, *range(200, 210)]
    labels = torch.cat([data.train_labels, data.val_labels, data.test_labels])
    assert labels.tolist() == [int(value >= 200) for value in values]


def test_beyond_the_memory_limit_images_lie_in_a_mapped_file(classes):
    inside, mapped = folder(classes), folder(classes, max_memory_gb=0.0)
    assert mapped.train_images.equal(inside.train_images)
    assert mapped.train_labels.equal(inside.train_labels)


def test_a_full_disk_is_told(classes, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.simclr.data.folder.os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        folder(classes, max_memory_gb=0.0)


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a folder"),
        ([], "no images in"),
        (["notes.txt"], "no images in"),
        (["a.png", "b.png"], "2 images are too few for 3 parts"),
        (["a.png", "b.png", "c.png"], "none of 1 images"),
    ],
)
def test_a_root_without_images_is_refused(tmp_path, files, message):
    root = tmp_path / "root"
    if files is not None:
        root.mkdir()
        for name in files:
            (root / name).write_text("x")
    with pytest.raises(UserError, match=message) as raised:
        folder(root)
    assert message.startswith("2") or str(root) in str(raised.value)


def test_so_many_of_each_class_are_drawn_alike_in_every_run(tmp_path):
    for i in range(20):
        write(tmp_path / "train" / "a" / f"{i}.png", i)
        write(tmp_path / "train" / "b" / f"{i}.png", 100 + i)
        write(tmp_path / "test" / "a" / f"{i}.png", 50 + i)
        write(tmp_path / "test" / "b" / f"{i}.png", 200 + i)
    arguments = {"train_per_class": 5, "eval_per_class": 1}
    data, again = folder(tmp_path, **arguments), folder(tmp_path, seed=7, **arguments)
    for part, rows in (("train", 5), ("val", 1), ("test", 1)):
        labels, images = getattr(data, f"{part}_labels"), getattr(data, f"{part}_images")
        assert labels.tolist() == [0] * rows + [1] * rows
        assert images.equal(getattr(again, f"{part}_images"))
        values = images[:, 0, 0, 0].tolist()
        assert len(set(values)) == 2 * rows
        bright = 200 if part == "test" else 100
        assert labels.tolist() == [int(value >= bright) for value in values]


def test_more_of_each_class_than_there_are_is_refused(classes, tmp_path):
    with pytest.raises(UserError, match="9 images of each class are wanted; one class has 7"):
        folder(classes, train_per_class=9)
    for i in range(5):
        write(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(UserError, match="need images in class folders"):
        folder(tmp_path / "flat", train_per_class=1)


def test_images_decoded_as_they_are_needed_are_those_decoded_first(classes):
    first, needed = folder(classes), folder(classes, workers=3)
    assert len(needed.train_dataloader()) == len(first.train_dataloader()) == 8
    seen = []
    for batch in needed.train_dataloader():
        assert batch["image"].shape == (2, 3, 8, 8)
        assert batch["image"].equal(needed.train_images[batch["index"]])
        assert batch["label"].equal((batch["image"][:, 0, 0, 0] >= 200).long())
        seen += batch["image"][:, 0, 0, 0].tolist()
    assert sorted(seen) == sorted(first.train_images[:, 0, 0, 0].tolist())


def test_decoded_as_needed_only_what_the_memory_holds_is_kept(classes):
    data = folder(classes, workers=1, max_memory_gb=5.5 * 3 * 8**2 / 1e9)
    assert len(data.train_images) == len(data.train_labels) == 5
    assert len(data.val_images) == 2
    rows = torch.cat([batch["index"] for batch in data.train_dataloader()])
    assert sorted(rows.tolist()) == list(range(16))


def test_a_broken_image_of_a_batch_is_named_and_replaced_by_another_of_the_batch(classes):
    data = folder(classes, workers=1, batch_size=4)
    broken = data.train_files.paths[3]
    broken.write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="left out") as warned:
        batches = list(data.train_dataloader())
    assert [str(broken) in str(warning.message) for warning in warned] == [True]
    rows = torch.cat([batch["index"] for batch in batches]).tolist()
    assert len(rows) == 16
    assert sorted(set(rows)) == [i for i in range(16) if i != 3]


def test_a_pass_left_before_its_end_stops_the_threads(classes):
    data = folder(classes, workers=2)
    before = threading.active_count()
    for _ in data.train_dataloader():
        assert threading.active_count() > before
        break
    assert threading.active_count() == before
