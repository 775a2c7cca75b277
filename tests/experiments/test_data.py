"""Data modules: parts, batches, order, and what a user can get wrong."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from experiments.simclr.data import RandomImages, ScatteredDigits
from experiments.simclr.data.base import Part
from experiments.simclr.evaluation.probes import knn_accuracy
from experiments.simclr.program.errors import UserError


def training_rows(data, epoch=0, rank=0, processes=1, batches_done=0):
    """The rows that one process of a trainer sees in one epoch."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=batches_done))
    data.trainer = SimpleNamespace(
        current_epoch=epoch,
        global_rank=rank,
        world_size=processes,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return torch.cat([batch["index"] for batch in data.train_dataloader()]).tolist()


@pytest.fixture(scope="module")
def digits():
    data = ScatteredDigits(batch_size=256)
    data.setup()
    return data


def test_training_batches_are_full_shuffled_rows_with_their_labels():
    data = RandomImages(batch_size=32, num_images=250, image_size=4)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 150 // 32
    index = torch.cat([batch["index"] for batch in batches])
    assert len(index) == len(index.unique()) == 4 * 32
    assert index.tolist() != sorted(index.tolist())
    for batch in batches:
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape == (32, 3, 4, 4)
        assert batch["image"].equal(data.train_images[batch["index"]])
        assert batch["label"].equal(data.train_labels[batch["index"]])


def test_evaluation_batches_are_all_rows_in_order():
    data = RandomImages(batch_size=32, num_images=200, image_size=4)
    for loader, part in [
        (data.val_dataloader(), lambda: data.val_images),
        (data.test_dataloader(), lambda: data.test_images),
    ]:
        assert torch.cat([batch["image"] for batch in loader]).equal(part())
        assert len(list(loader)) == len(loader) == 2


def test_order_depends_on_seed_and_epoch_alone():
    data = RandomImages(8, seed=0)
    first, second = training_rows(data, epoch=0), training_rows(data, epoch=1)
    assert first != second
    torch.manual_seed(123)
    assert training_rows(RandomImages(8, seed=0), epoch=1) == second
    other = RandomImages(8, seed=1)
    assert training_rows(other, epoch=0) not in (first, second)


def test_an_epoch_goes_on_where_it_was_interrupted():
    data = RandomImages(8)
    assert training_rows(data, batches_done=3) == training_rows(data)[3 * 8 :]


class Recorder(L.LightningModule):
    """Learns nothing, and keeps the rows that each training epoch shows it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows = {}

    def training_step(self, batch, batch_idx):
        self.rows.setdefault(self.current_epoch, []).extend(batch["index"].tolist())
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Checkpoint directory")
def test_a_resumed_run_sees_the_rows_of_one_never_interrupted(tmp_path):
    def run(ckpt_path=None):
        model = Recorder()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=3,
            callbacks=L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=RandomImages(batch_size=16), ckpt_path=ckpt_path)
        return model.rows

    whole = run()
    assert [len(rows) for rows in whole.values()] == [154 // 16 * 16] * 3
    assert whole[0] != whole[1] != whole[2]
    assert run(tmp_path / "epoch=0.ckpt") == {1: whole[1], 2: whole[2]}


def test_processes_share_the_training_rows():
    data = RandomImages(batch_size=16, num_images=250, image_size=4)
    rows = [training_rows(data, rank=rank, processes=2) for rank in range(2)]
    assert [len(part) for part in rows] == [75 // 16 * 16] * 2
    assert len(set(rows[0] + rows[1])) == len(rows[0] + rows[1])


def test_setup_twice_changes_nothing():
    data = RandomImages(batch_size=8)
    data.setup()
    images = data.train_images
    data.setup("fit")
    assert data.train_images is images


@pytest.mark.parametrize("seed", [0, 1])
def test_the_training_seed_does_not_change_the_images(digits, seed):
    other = ScatteredDigits(batch_size=64, seed=seed)
    other.setup()
    for part in ("train_images", "val_images", "test_images", "train_labels", "test_labels"):
        assert getattr(other, part).equal(getattr(digits, part))


def test_digits_have_three_parts_of_ten_classes(digits):
    assert digits.num_classes == 10
    assert digits.class_names == list("0123456789")
    sizes = [len(digits.train_images), len(digits.val_images), len(digits.test_images)]
    assert sum(sizes) == 4 * 1797
    for part in ("train", "val", "test"):
        images, labels = getattr(digits, f"{part}_images"), getattr(digits, f"{part}_labels")
        assert images.shape == (len(labels), 3, 32, 32)
        assert images.dtype == torch.uint8
        assert labels.unique().tolist() == list(range(10))


def test_no_digit_is_in_two_parts():
    """With no noise and no randomness in the rendering, every image is its digit."""
    data = ScatteredDigits(
        64, renders=1, min_scale=1.0, max_scale=1.0, max_rotation=0.0, min_contrast=1.0, noise=0.0
    )
    data.setup()
    parts = [data.train_images, data.val_images, data.test_images]
    digits = [{image.numpy().tobytes() for image in part} for part in parts]
    assert all(len(digit) == len(part) for digit, part in zip(digits, parts, strict=True))
    assert len(set.union(*digits)) == 1797


def test_raw_pixels_do_not_solve_the_digits(digits):
    train, test = (
        images.flatten(1).float() for images in (digits.train_images, digits.test_images)
    )
    accuracy = knn_accuracy(train, digits.train_labels, test, digits.test_labels)
    assert 0.5 < accuracy <= 0.70


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"batch_size=151 .* 150 training images"):
        RandomImages(batch_size=151, num_images=250, image_size=4).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 1, "image_size": 0}, "image_size must be at least 1; got 0"),
        ({"batch_size": 1, "num_images": 2}, "num_images must be at least 3; got 2"),
        ({"batch_size": 1, "num_classes": 0}, "num_classes must be at least 1; got 0"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        RandomImages(**arguments)


def test_one_class_counts_as_no_labels():
    data = RandomImages(batch_size=8, image_size=4, num_classes=1)
    with pytest.warns(UserWarning, match="all training images are of one class"):
        data.setup()
    assert data.num_classes is None
    assert data.train_labels is data.val_labels is data.test_labels is None


@pytest.mark.parametrize(("free", "home"), [(2, "cuda"), (1.9, "cpu")])
def test_training_images_lie_on_the_gpu_where_they_fit_in_half_of_its_memory(
    monkeypatch, free, home
):
    data = RandomImages(batch_size=8, num_images=250, image_size=4)
    training_rows(data)
    data.trainer.strategy.root_device = torch.device("cuda")
    size = data.train_images.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * size, 100 * size))
    moved = []
    monkeypatch.setattr(Part, "to", lambda part, device: moved.append(device.type) or part)
    data.train_dataloader()
    assert moved == [home]
