"""python -m experiments.embed: tables that agree with the model, a page that agrees with them."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image, ImageOps

from experiments import embed as program
from experiments.simclr.data import ImageFolder
from experiments.simclr.evaluation.neighbourhood import flat_map, near_duplicates, nearest_others


@pytest.fixture
def embed(in_process):
    """embed("ckpt_path=...", ...) runs experiments.embed."""
    return lambda *arguments: in_process(program.main, list(arguments))


@pytest.fixture
def photos(tmp_path):
    """Class folders of noise, one copied and one mirrored, with names that trip a careless page."""
    generator = np.random.default_rng(0)
    root = tmp_path / "photos"
    for i in range(12):
        folder = root / ("a <!--<script>", "b & c")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        rough = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(rough).resize((40, 40), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:02} é.png")
        if i == 3:
            image.resize((30, 30)).save(root / "a <!--<script>" / "copy.jpg", quality=70)
        if i == 4:
            ImageOps.mirror(image).save(folder / "mirrored.png")
    (root / "b & c" / "broken.png").write_bytes(b"junk")
    return root


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    (found,) = re.findall(
        r'<script type="application/json" id="content">(.*?)</script>', page, re.S
    )
    return page, json.loads(found)


@pytest.fixture
def embedded(embed, smoke_run, photos, tmp_path):
    """The folder written for the photos."""
    out = f"out={tmp_path}/out"
    with pytest.warns(UserWarning, match=r"left out .*broken\.png"):
        run = embed(f"ckpt_path={smoke_run}", f"data.root={photos}", out, "map=pca", "shown=5")
    assert run.status == 0, run.err
    assert "embedded 14 images: 16 features each" in run.out
    assert f"file://{tmp_path}/out/index.html" in run.out
    return tmp_path / "out"


@torch.no_grad()
def test_each_row_has_the_models_features_of_its_file(embedded, smoke_run, photos):
    features, rows = np.load(embedded / "embeddings.npy"), table(embedded / "embeddings.csv")
    assert features.shape == (14, 16)
    assert len({row["file"] for row in rows}) == 14
    saved = torch.load(smoke_run / "checkpoints/last.ckpt", weights_only=True)
    model = instantiate(saved["hyper_parameters"]["model"])
    model.load_state_dict(saved["state_dict"])
    decoder = ImageFolder(str(photos), batch_size=1, image_size=16)  # the run's size
    for vector, row in zip(features, rows, strict=True):
        assert row["class"] == row["file"].split("/")[0]
        expected = model.eval()(decoder._decode(photos / row["file"])[None])[0]
        torch.testing.assert_close(torch.from_numpy(vector), expected, rtol=1e-4, atol=1e-5)
        assert [np.float32(row[f"f{i}"]) for i in range(16)] == vector.tolist()


def test_neighbours_are_the_largest_cosines(embedded):
    features = torch.from_numpy(np.load(embedded / "embeddings.npy"))
    names = [row["file"] for row in table(embedded / "embeddings.csv")]
    units = features / features.norm(dim=1, keepdim=True)
    rows = table(embedded / "neighbours.csv")
    assert len(rows) == 14 * 8
    for name in names[:3]:
        mine = units @ units[names.index(name)]
        mine[names.index(name)] = -2
        best = [names[i] for i in mine.argsort(descending=True)[:8].tolist()]
        assert [row["neighbour"] for row in rows if row["file"] == name] == best


def test_copies_are_found_and_nothing_else(embedded):
    pairs = {
        frozenset((row["file"].split("/")[1], row["duplicate"].split("/")[1])): row["mirrored"]
        for row in table(embedded / "duplicates.csv")
    }
    assert pairs == {
        frozenset(("03 é.png", "copy.jpg")): "no",
        frozenset(("04 é.png", "mirrored.png")): "yes",
    }


def test_the_page_holds_what_it_shows_and_loads_nothing(embedded, photos):
    page, shown = content(embedded)
    # of what a browser would fetch there is nothing but links to the images
    assert re.findall(r"""(?:src|href)\s*=\s*["']""", page) == []
    assert "http" not in page
    assert shown["classes"] == ["a <!--<script>", "b & c"]
    assert len(shown["points"]) == shown["count"] == 14
    assert len(shown["neighbours"]) == 5
    assert len(shown["pairs"]) == shown["pairs_in_all"] == 2
    for row, others in shown["neighbours"]:
        for number in (row, *(other for other, _ in others)):
            image = shown["images"][str(number)]
            assert image["thumbnail"].startswith("data:image/jpeg;base64,")
            assert image["address"].startswith(photos.as_uri())
            assert "%3C%21--%3Cscript%3E" in image["address"] or "%26" in image["address"]


def test_a_runs_own_images_and_parquet(embed, smoke_run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra embed")
    out = f"out={tmp_path}/out"
    run = embed(f"ckpt_path={smoke_run}", out, "table=parquet", "map=pca", "neighbours=2")
    assert run.status == 0, run.err
    rows = parquet.read_table(tmp_path / "out/embeddings.parquet").to_pylist()
    assert len(rows) == 240
    assert (rows[0]["file"], rows[144]["file"], rows[-1]["file"]) == ("train/0", "val/0", "test/47")
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    assert np.array_equal(vectors, np.load(tmp_path / "out/embeddings.npy"))
    _, shown = content(tmp_path / "out")
    assert shown["images"]["0"]["address"] is None


MISTAKES = {
    "map": (["map=tsne"], "map must be pca or umap; got tsne"),
    "table": (["table=xlsx"], "table must be csv or parquet; got xlsx"),
    "neighbours": (["neighbours=0"], "neighbours must be a whole number of at least 1; got 0"),
    "duplicates": (["duplicates=95"], "duplicates must be a correlation from -1 to 1; got 95"),
    "unknown": (["neighbors=3"], "neighbors is as it was trained"),
    "no folder": (["data.root=/nowhere"], "data.root=/nowhere is not a folder"),
    "there": (["out=tests"], "tests is there already"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(embed, smoke_run, mistake):
    arguments, words = MISTAKES[mistake]
    before = sorted(smoke_run.rglob("*"))
    run = embed(f"ckpt_path={smoke_run}", *arguments)
    assert run.status == 2, run.err
    assert len(run.err.strip().splitlines()) == 1, run.err
    assert words in run.err
    assert sorted(smoke_run.rglob("*")) == before


def test_without_the_extra_it_is_named(embed, smoke_run, monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    for setting in ("map=umap", "table=parquet"):
        run = embed(f"ckpt_path={smoke_run}", setting)
        assert run.status == 2
        assert 'pip install -e ".[embed]"' in run.err
    assert program.checked(program.SETTINGS)["map"] == "pca"


@pytest.mark.slow
def test_umap_keeps_groups_together_alike_in_every_run():
    pytest.importorskip("umap", reason="needs the extra embed")
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[:2].repeat_interleave(20, dim=0)
    features = centres + 0.1 * torch.randn(40, 8, generator=generator)
    points = flat_map(features, "umap")
    assert torch.equal(points, flat_map(features, "umap"))
    distance = torch.cdist(points, points)
    assert distance[:20, :20].max() < distance[:20, 20:].min()


@pytest.mark.parametrize("rows", [2, 3, 9])
def test_few_images_have_a_map(rows):
    points = flat_map(torch.randn(rows, 5), "pca")
    assert points.shape == (rows, 2)
    assert points.isfinite().all()


def test_two_images_without_labels_are_enough(embed, smoke_run, tmp_path):
    for i in range(2):
        Image.effect_noise((24, 20), 100).save(tmp_path / f"{i}.png")
    run = embed(f"ckpt_path={smoke_run}", f"data.root={tmp_path}", f"out={tmp_path}/out")
    assert run.status == 0, run.err
    assert [row["class"] for row in table(tmp_path / "out/embeddings.csv")] == ["", ""]
    _, shown = content(tmp_path / "out")
    assert (shown["map"], shown["classes"]) == ("PCA", [])


def test_the_map_has_the_largest_variance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator) * torch.tensor([9, 5, 1, 1, 1, 1])
    units = features / features.norm(dim=1, keepdim=True)
    values = torch.linalg.svdvals(units - units.mean(0))
    found = flat_map(features, "pca").norm(dim=0)
    torch.testing.assert_close(found, values[:2], rtol=1e-4, atol=1e-4)


def test_rows_that_are_all_the_same_are_not_their_own_neighbours():
    similarity, rows = nearest_others(torch.ones(6, 3), k=2)
    assert rows.shape == similarity.shape == (6, 2)
    assert not (rows == torch.arange(6)[:, None]).any()


def test_even_images_are_alike_by_their_brightness():
    levels = torch.tensor([0, 0, 255, 254], dtype=torch.uint8)
    grey = levels[:, None, None].expand(4, 16, 16).clone()
    pairs = near_duplicates(torch.eye(4), grey, 0.95)
    assert {(pair.first, pair.second) for pair in pairs} == {(0, 1), (2, 3)}
