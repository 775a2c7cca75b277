"""Layouts of folders: what is understood of them, what is left out, and what is said."""

import os

import pytest

from experiments.simclr.data.layout import part_of, read_layout
from experiments.simclr.program.errors import UserError


@pytest.fixture
def layout(tmp_path):
    """layout("a/1.png", ...) is that of a folder with these files; "a -> b" is a link."""

    def read(*files, root="."):
        for file in files:
            name, _, target = file.partition(" -> ")
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target) if target else path.touch()
        return read_layout(tmp_path / root)

    return read


def summary(layout):
    """Class names, and each part's files by class."""
    found = {}
    for part, images in layout.parts.items():
        labels = [None if i.label is None else layout.classes[i.label] for i in images]
        found[part] = sorted(
            (label or "-", image.path.name) for label, image in zip(labels, images, strict=True)
        )
    return layout.classes, found


AB = ["a", "b"]
ONE_EACH = [("a", "1.png"), ("b", "2.png")]


@pytest.mark.parametrize("wrap", ["images/", "data set/images/", "dataset/train/"])
def test_folders_around_the_classes_are_looked_into(layout, wrap):
    found = layout(f"{wrap}a/1.png", f"{wrap}b/2.png")
    assert summary(found) == (AB, {"train": ONE_EACH})
    assert any("looked into" in note for note in found.notes)


def test_what_lies_beside_the_folder_of_the_classes_is_left_out(layout):
    found = layout("logo.png", "images/a/1.png", "images/b/2.png")
    assert summary(found) == (AB, {"train": ONE_EACH})
    assert any("logo.png" in note for note in found.notes)


def test_one_folder_of_images_is_no_class(layout):
    assert summary(layout("a/1.png", "a/2.png")) == (
        None,
        {"train": [("-", "1.png"), ("-", "2.png")]},
    )


def test_one_folder_beside_images_is_more_of_them(layout):
    found = layout("1.png", "2.png", "more/3.png")
    assert summary(found) == (None, {"train": [("-", f"{i}.png") for i in (1, 2, 3)]})
    assert any("more/" in note for note in found.notes)


def test_images_beside_classes_are_left_out_and_counted(layout):
    found = layout("a/1.png", "b/2.png", "3.png", "4.png")
    assert summary(found) == (AB, {"train": ONE_EACH})
    assert any("2 images" in note and "3.png" in note for note in found.notes)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "VAL", "Test"),
        ("training", "validation", "testing"),
        ("train", "valid", "test"),
        ("training_set", "dev", "test_set"),
        ("train2017", "val2017", "test2017"),
        ("seg_train/seg_train", "val/x", "seg_test/seg_test"),
    ],
)
def test_parts_by_their_usual_names(layout, train, val, test):
    found = layout(*(f"{part}/{f}" for part in (train, val, test) for f in ("a/1.png", "b/2.png")))
    assert summary(found) == (AB, dict.fromkeys(("train", "val", "test"), ONE_EACH))
    assert not found.pool


def test_folders_beside_the_parts_are_left_out(layout):
    found = layout("train/a/1.png", "train/b/2.png", "test/a/3.png", "extra/4.png", "masks/5.png")
    assert summary(found) == (AB, {"train": ONE_EACH, "test": [("a", "3.png")]})
    assert any("extra/ and masks/, 2 images" in note for note in found.notes)


def test_a_class_of_trains_is_a_class(layout):
    found = layout("bus/1.png", "car/2.png", "train/3.png")
    assert found.classes == ["bus", "car", "train"]
    assert found.pool


def test_classes_that_are_named_as_parts_beside_others(layout):
    assert layout("dev/1.png", "prod/2.png", "test/3.png").classes == ["dev", "prod", "test"]


def test_parts_without_one_to_train_on_are_refused(layout):
    with pytest.raises(UserError, match=r"has test/ and val/ and no train/"):
        layout("test/a/1.png", "val/a/1.png")


def test_two_folders_for_one_part_are_refused(layout):
    with pytest.raises(UserError, match=r"val/ and valid/, and each may be the val part"):
        layout("train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png")


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_part_without_class_folders_is_left_out_where_training_has_them(layout, part):
    found = layout("train/a/1.png", "train/b/2.png", f"{part}/3.png", f"{part}/4.png")
    assert summary(found) == (AB, {"train": ONE_EACH})
    assert any(f"2 images of {part}/" in note for note in found.notes)


def test_parts_without_classes(layout):
    found = layout("train/1.png", "val/2.png", "test/3.png")
    assert summary(found) == (
        None,
        {"train": [("-", "1.png")], "val": [("-", "2.png")], "test": [("-", "3.png")]},
    )


@pytest.mark.parametrize("one", ["a", "images"])
def test_one_class_in_every_part(layout, one):
    classes, parts = summary(layout(f"train/{one}/1.png", f"test/{one}/2.png"))
    assert classes is None
    assert parts == {"train": [("-", "1.png")], "test": [("-", "2.png")]}


def test_links_are_followed_once(layout, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "3.png").touch()
    (outside / "4.png").touch()
    (outside / "nested").symlink_to(".")
    found = layout(
        "in/a/1.png",
        "in/b/2.png",
        f"in/a/more -> {outside}",  # a folder elsewhere: its images are the class's
        "in/b/loop -> ..",  # would give everything a second label
        "in/c -> a",  # so would an alias
        "in/b/up -> ../..",
        f"in/b/again.png -> {outside}/3.png",
        "in/b/nowhere.png -> nothing.png",
        root="in",
    )
    assert summary(found) == (
        AB,
        {"train": [("a", "1.png"), ("a", "3.png"), ("a", "4.png"), ("b", "2.png")]},
    )
    notes = "\n".join(found.notes)
    for left_out in ("b/loop", "c", "b/up", "b/again.png", "b/nowhere.png", "a/more/nested"):
        assert left_out in notes


def test_classes_of_links_to_files_elsewhere(layout):
    pool = [f"pool/{i}.png" for i in range(4)]
    links = [f"in/{'ab'[i % 2]}/{i}.png -> ../../pool/{i}.png" for i in range(4)]
    found = layout(*pool, *links, root="in")
    assert summary(found)[1]["train"] == [
        ("a", "0.png"),
        ("a", "2.png"),
        ("b", "1.png"),
        ("b", "3.png"),
    ]


def test_the_same_folder_as_training_and_test_part_is_one(layout):
    found = layout("train/a/1.png", "train/b/2.png", "test -> train")
    assert summary(found) == (AB, {"train": ONE_EACH})
    assert "a link to a folder that is read already" in "\n".join(found.notes)


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", ".cache/deep", "@eaDir"])
def test_hidden_folders_do_not_count_at_any_depth(layout, hidden):
    found = layout("a/1.png", "b/2.png", f"a/{hidden}/3.png", f"{hidden}/4.png", "b/._2.png")
    assert summary(found) == (AB, {"train": ONE_EACH})
    assert any(hidden.partition("/")[0] in note for note in found.notes)


def test_what_is_no_image_is_counted_by_its_ending(layout):
    found = layout("a/1.png", "b/2.png", "a/1.xml", "b/2.xml", "README", "notes/x.txt")
    assert summary(found) == (AB, {"train": ONE_EACH})
    notes = "\n".join(found.notes)
    assert "2 .xml" in notes
    assert "notes: no image in it" in notes


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "two\nlines", "tab\there", "日本"])
def test_any_name_that_a_disk_allows_is_a_class(layout, name):
    found = layout(f"{name}/1.png", "b/2.png")
    assert set(found.classes) == {name, "b"}
    assert len(found.parts["train"]) == 2


def test_ordinary_names_say_no_part():
    for name in ("trained", "traintracks", "validated", "tester", "devil", "evaluations", "tests"):
        assert part_of(name) is None


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_named_as_an_image_is_left_out(tmp_path, linked):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).touch()
    place = tmp_path / "elsewhere" if linked else tmp_path / "root/a/pipe.png"
    os.mkfifo(place)
    if linked:
        (tmp_path / "root/a/pipe.png").symlink_to(place)
    found = read_layout(tmp_path / "root")
    assert [image.path.name for image in found.images()] == ["1.png", "1.png"]
    assert found.notes == ["left out a/pipe.png: no regular file"]
