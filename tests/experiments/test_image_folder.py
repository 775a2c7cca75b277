"""Folders of images: layouts, broken images, memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data import ImageFolder
from experiments.errors import UserError


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

    monkeypatch.setattr("experiments.data.folder.os.posix_fallocate", full)
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
