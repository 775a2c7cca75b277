"""torchvision's data sets: small files in their real formats, and what is missing or broken."""

import pickle
import re
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from experiments.simclr.data import CIFAR10, STL10, FashionMNIST
from experiments.simclr.program.errors import UserError

FILES = {
    CIFAR10: ["cifar-10-python.tar.gz"],
    STL10: ["stl10_binary.tar.gz"],
    FashionMNIST: [
        "FashionMNIST/raw/train-images-idx3-ubyte.gz",
        "FashionMNIST/raw/train-labels-idx1-ubyte.gz",
        "FashionMNIST/raw/t10k-images-idx3-ubyte.gz",
        "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz",
    ],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)


def write_fashion_mnist(root):
    """Image i of either part is all i, of class i % 10."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, rows in [("train", 40), ("t10k", 20)]:
        pixels = np.repeat(np.arange(rows, dtype=np.uint8), 28 * 28)
        header = struct.pack(">iiii", 0x803, rows, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(rows) % 10).astype(np.uint8)
        header = struct.pack(">ii", 0x801, rows)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def write_cifar10(root, monkeypatch):
    """Image i of either part is i in red, its row in green and 0 in blue, of class i % 10."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, rows in [("data_batch_1", 40), ("test_batch", 20)]:
        images = np.zeros((rows, 3, 32, 32), dtype=np.uint8)
        images[:, 0] = np.arange(rows)[:, None, None]
        images[:, 1] = np.arange(32)[:, None]
        batch = {"data": images.reshape(rows, -1), "labels": [i % 10 for i in range(rows)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("test_batch", None)])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)


def write_stl10(root, monkeypatch):
    """Image i of either part is i in red, its row in green and 0 in blue, of class i % 10."""
    folder = root / "stl10_binary"
    folder.mkdir()
    for name, rows in [("train", 40), ("test", 20)]:
        images = np.zeros((rows, 3, 96, 96), dtype=np.uint8)
        images[:, 0] = np.arange(rows)[:, None, None]
        images[:, 1] = np.arange(96)  # STL-10 stores columns first
        (folder / f"{name}_X.bin").write_bytes(images.tobytes())
        labels = (np.arange(rows) % 10 + 1).astype(np.uint8)  # STL-10 counts from 1
        (folder / f"{name}_y.bin").write_bytes(labels.tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)


def check_parts(data, grey):
    data.prepare_data()
    data.setup()
    assert data.num_classes == len(data.class_names) == 10
    assert [len(data.train_images), len(data.val_images), len(data.test_images)] == [36, 4, 20]
    for part in ("train", "val", "test"):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, data.image_size, data.image_size)
        assert labels.dtype == torch.int64
        red = images[:, :1]
        assert labels.equal(red[:, 0, 0, 0].long() % 10)
        assert (red == red[:, :, :1, :1]).all()
        if grey:
            assert (images == red).all()
        else:
            assert (images[:, 1].diff(dim=1).sum(1) > 25).all()
            assert (images[:, 1] == images[:, 1, :, :1]).all()
            assert (images[:, 2] == 0).all()
    drawn = torch.cat([data.train_images, data.val_images])[:, 0, 0, 0]
    assert sorted(drawn.tolist()) == list(range(40))


@pytest.mark.parametrize("image_size", [28, 32])
def test_fashion_mnist(tmp_path, image_size):
    write_fashion_mnist(tmp_path)
    check_parts(FashionMNIST(8, root=str(tmp_path), image_size=image_size), grey=True)


def test_cifar10(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    check_parts(CIFAR10(8, root=str(tmp_path)), grey=False)


@pytest.mark.parametrize("image_size", [96, 64])
def test_stl10(tmp_path, monkeypatch, image_size):
    write_stl10(tmp_path, monkeypatch)
    check_parts(STL10(8, root=str(tmp_path), image_size=image_size), grey=False)


@pytest.mark.parametrize("kind", FILES)
def test_without_a_network_the_files_are_named(tmp_path, kind):
    with pytest.raises(UserError, match=f"could not download or read {kind.__name__}") as raised:
        kind(8, root=str(tmp_path)).setup()
    for file in FILES[kind]:
        assert str(tmp_path / file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_broken_file_is_the_users_to_mend(tmp_path):
    write_fashion_mnist(tmp_path)
    images = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(UserError, match=re.escape(str(images.parent))):
        FashionMNIST(8, root=str(tmp_path)).setup()
