"""What a run of train.py shows in TensorBoard, read from its event files."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from experiments.simclr.evaluation.overview import OVERVIEW


@pytest.fixture(scope="module")
def page(smoke_run):
    found = EventAccumulator(str(smoke_run / "train"), {"tensors": 0})
    found.Reload()
    return found


def test_scalars(page):
    tags = set(page.Tags()["scalars"])
    assert tags >= {
        "train/loss",
        "train/learning_rate",
        "train/images_per_second",
        "val/loss",
        "val/knn",
        "representation/embedding_std",
        "representation/effective_rank",
        "representation/alignment",
        "representation/uniformity",
        "test/knn",
        "test/linear",
        "test/linear_1_percent",
    }
    assert all(point.value > 0 for point in page.Scalars("train/images_per_second"))
    rates = [point.value for point in page.Scalars("train/learning_rate")]
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert min(rates) < 2e-4


def test_the_first_group_of_the_first_page_is_explained(page):
    """Loss, k-NN, gradients, effective rank, alignment and uniformity, side by side."""
    tags = [tag for kind in ("scalars", "tensors", "images") for tag in page.Tags()[kind]]
    tags = [t for t in tags if "/" in t and not t.endswith("text_summary")]  # not those of *Text*
    groups = sorted({tag.partition("/")[0] for tag in tags})
    assert groups[0] == "Overview"
    assert "epoch" not in page.Tags()["scalars"]
    explained = [tag for tag, _ in OVERVIEW.values()]
    figures = [f"Overview/gradient of loss on {name}" for name in ("input1", "input2")]
    first = sorted(tag for tag in tags if tag.startswith("Overview/"))
    assert first == sorted(explained + figures)
    assert first[:4] == explained[:2] + figures
    for name, (tag, meaning) in OVERVIEW.items():
        points = [(p.step, tensor_util.make_ndarray(p.tensor_proto)) for p in page.Tensors(tag)]
        assert points == [(p.step, pytest.approx(p.value)) for p in page.Scalars(name)]
        metadata = page.SummaryMetadata(tag)
        assert metadata.plugin_data.plugin_name == "scalars"
        assert metadata.summary_description == meaning


def test_the_layout_tells_gradients_training_and_representation(page):
    layout = layout_pb2.Layout()
    last = page.Tensors("custom_scalars__config__")[-1]
    layout.ParseFromString(last.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "gradient of loss: 3 checks, all right",
        "gradient of loss by finite differences: 3 checks, all right",
        "training",
        "representation",
    ]
    charted = {t for c in layout.category for chart in c.chart for t in chart.multiline.tag}
    assert charted <= set(page.Tags()["scalars"]), "a chart would be empty"


def test_pictures(page, smoke_run):
    assert set(page.Tags()["images"]) >= {
        "augmentation/views",
        "evaluation/nearest_neighbours",
        "evaluation/confusion_matrix",
    }
    for name in ("views", "nearest_neighbours", "confusion_matrix"):
        assert (smoke_run / f"pictures/{name}.png").stat().st_size > 5000
        # TensorBoard would leave out or repeat columns of pixels of one that is not so wide
        shown = page.Images(next(t for t in page.Tags()["images"] if t.endswith(name)))
        assert {image.width for image in shown} == {350}


def test_embedding_has_thumbnails_and_class_names(smoke_run):
    projector = (smoke_run / "train/projector_config.pbtxt").read_text()
    assert "sprite.png" in projector
    (names,) = smoke_run.glob("train/*/test_features/metadata.tsv")
    (rows,) = smoke_run.glob("train/*/test_features/tensors.tsv")
    assert len(names.read_text().splitlines()) == len(rows.read_text().splitlines()) == 48


def test_hyperparameters_go_with_the_final_metrics(page):
    assert {"test/knn", "test/linear"} <= set(page.Tags()["scalars"])
    metadata = page.SummaryMetadata("_hparams_/session_start_info")
    session = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    assert set(session.session_start_info.hparams) == {
        "data.batch_size",
        "loss",
        "loss.margin",
        "loss.negative_weight",
        "optimizer",
        "optimizer.lr",
        "optimizer.weight_decay",
        "seed",
        "trainer.max_epochs",
    }
    experiment = page.SummaryMetadata("_hparams_/experiment")
    found = plugin_data_pb2.HParamsPluginData.FromString(experiment.plugin_data.content)
    assert "test/knn" in {info.name.tag for info in found.experiment.metric_infos}
