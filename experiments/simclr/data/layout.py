"""What a folder of images holds: its parts, its classes, and what is left out of them and why."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.simclr.data.image_file import EXTENSIONS
from experiments.simclr.program.errors import UserError

PARTS = {
    "train": r"train|training|trn",
    "val": r"val|valid|validation|dev|eval",
    "test": r"test|testing|tst",
}
# Train, training_set, test-images, val2017, seg_train
PART_NAME = r"(?:seg_)?(?:{})(?:[ _-]?(?:set|split|part|data|images|imgs|20\d\d))?"
ENDING_LINES = ("Cc", "Zl", "Zp")  # Unicode's control characters, and ends of lines and paragraphs
OF_SYSTEMS = {"__macosx", "@eadir", "lost+found", "$recycle.bin"}


@dataclass(frozen=True)
class Image:
    """The path of an image, and its class's number where there are classes."""

    path: Path
    label: int | None = None


@dataclass
class Layout:
    """What was understood of a folder.

    Args:
        classes: names of the classes' folders; None where there are fewer than two.
        parts: the images of "train" and, where the folder has them, of "val" and "test".
        pool: whether no folder is named as a part, and all images are to be divided.
        notes: what was left out or looked into, and why, a line each.
    """

    classes: list[str] | None
    parts: dict[str, list[Image]]
    pool: bool
    notes: list[str]

    def images(self) -> list[Image]:
        """Those of all parts."""
        return [image for part in self.parts.values() for image in part]


@dataclass(frozen=True)
class _Folder:
    """A folder in memory: its own images, its folders that hold images, by name and in order."""

    path: Path
    images: list[Path]
    folders: dict[str, "_Folder"]

    def all_images(self) -> Iterator[Path]:
        yield from self.images
        for folder in self.folders.values():
            yield from folder.all_images()

    def __len__(self) -> int:
        return len(self.images) + sum(map(len, self.folders.values()))


def read_layout(root: Path) -> Layout:
    """The layout of the folder `root`; raises UserError where it cannot be told.

    A folder that holds one folder of images and nothing else is looked into. Folders that are named
    as parts are the parts; elsewhere all images are one. Two or more folders of images are classes,
    with what lies in them at any depth; images beside them have no class and are left out. With
    fewer, nothing has a class.
    """
    notes: list[str] = []
    tree = _Reader(root, notes).read()
    if not len(tree):
        endings = ", ".join(sorted(EXTENSIONS))
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"no images in {root}: expected files that end in {endings}{reasons}")
    tree = _unwrapped(tree, notes, but="train")
    parts = _part_folders(tree, notes)
    train = _unwrapped(parts["train"], notes)
    classes = _classes(train, notes)
    found = {"train": _labelled(train, classes, notes)}
    for part in ("val", "test"):
        if part not in parts:
            continue
        if images := _other_part(parts[part], classes, parts["train"], notes):
            found[part] = images
    return Layout(classes, found, parts["train"] is tree, notes)


def readable(name: str) -> str:
    """The name of a file or folder as text that can be written in UTF-8.

    Example:
        >>> print(readable(os.fsdecode(b"caf\\xe9")))
        caf\\xe9
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """The name of a file or folder as text that stays on its line: control characters escaped.

    Example:
        >>> print(printable("two\\nlines"))
        two\\nlines
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ENDING_LINES else c
        for c in readable(name)
    )


class _Reader:
    """Reads the tree of a folder, each real folder and file once, what is real before links."""

    def __init__(self, root: Path, notes: list[str]) -> None:
        self.root = root
        self.notes = notes
        self.read_folders: set[str] = set()  # real paths
        self.linked_files: set[str] = set()  # real paths
        self.links: list[tuple[_Folder, os.DirEntry]] = []
        self.no_images = Counter[str]()  # endings
        self.left_out: dict[str, list[str]] = {}

    def read(self) -> _Folder:
        tree = self._folder(self.root)
        file_links = []
        while self.links:  # a folder behind a link may hold links
            folder, entry = self.links.pop(0)
            if entry.is_dir():
                self._follow(folder, entry)
            else:
                file_links.append((folder, entry))
        for folder, entry in file_links:
            self._add_linked_file(folder, entry)
        tree = self._with_images(tree)
        for why, places in self.left_out.items():
            more = f" and {len(places) - 3:,} more" if len(places) > 3 else ""
            self.notes.append(f"left out {', '.join(places[:3])}{more}: {why}")
        if self.no_images:
            kinds = ", ".join(f"{n:,} {ending}" for ending, n in self.no_images.most_common(5))
            self.notes.append(f"left out what does not end as an image: {kinds}")
        return tree

    def _folder(self, path: Path) -> _Folder:
        self.read_folders.add(os.path.realpath(path))
        folder = _Folder(path, [], {})
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                self._add(folder, entry)
        return folder

    def _add(self, folder: _Folder, entry: os.DirEntry) -> None:
        path = folder.path / entry.name
        if entry.name.startswith(".") or entry.name.lower() in OF_SYSTEMS:
            if entry.is_dir() or _is_image(path):  # of the others nobody wants to hear
                self._leave_out(path, "hidden, or a system's own")
        elif entry.is_symlink():
            self.links.append((folder, entry))
        elif not entry.is_dir():
            if _is_image(path) and not entry.is_file():  # whoever opens a pipe waits for a writer
                self._leave_out(path, "no regular file")
            elif _is_image(path):
                folder.images.append(path)
            else:
                self.no_images[printable(path.suffix.lower()) or "without an ending"] += 1
        elif os.path.realpath(path) in self.read_folders:  # reached through a link before
            self._leave_out(path, "read already")
        else:
            folder.folders[entry.name] = self._folder(path)

    def _follow(self, folder: _Folder, entry: os.DirEntry) -> None:
        path = folder.path / entry.name
        real = os.path.realpath(path)
        if real in self.read_folders:
            self._leave_out(path, "a link to a folder that is read already")
        elif os.path.commonpath([real, os.path.realpath(self.root)]) == real:
            self._leave_out(path, f"a link to a folder that holds {printable(str(self.root))}")
        else:
            folder.folders[entry.name] = self._folder(path)

    def _add_linked_file(self, folder: _Folder, entry: os.DirEntry) -> None:
        path = folder.path / entry.name
        real = os.path.realpath(path)
        if not path.exists():
            self._leave_out(path, "a link that leads nowhere")
        elif not _is_image(path):
            self.no_images[printable(path.suffix.lower()) or "without an ending"] += 1
        elif not path.is_file():
            self._leave_out(path, "no regular file")
        elif real in self.linked_files or self._is_read(Path(real)):
            self._leave_out(path, "a link to an image that is read already")
        else:
            self.linked_files.add(real)
            folder.images.append(path)

    def _is_read(self, real: Path) -> bool:
        return str(real.parent) in self.read_folders and _is_image(real) and real.name[0] != "."

    def _with_images(self, folder: _Folder) -> _Folder:
        """The folder, in order, without the folders that hold no image."""
        kept = {}
        for name, inside in sorted(folder.folders.items()):
            if len(inside):
                kept[name] = self._with_images(inside)
            else:
                self._leave_out(inside.path, "no image in it")
        return _Folder(folder.path, sorted(folder.images), kept)

    def _leave_out(self, path: Path, why: str) -> None:
        place = printable(os.path.relpath(path, self.root))
        self.left_out.setdefault(why, []).append(place)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _unwrapped(folder: _Folder, notes: list[str], but: str | None = None) -> _Folder:
    """The folder that holds the images, where those above it hold one folder each.

    Args:
        but: a folder named as this part is not looked into.
    """
    while len(folder.folders) == 1:
        ((name, inside),) = folder.folders.items()
        # one flat folder beside images is more of the same; one that is sorted is the data
        named = but is not None and part_of(name) == but
        if named or (folder.images and len(inside.folders) < 2):
            break
        notes.append(f"looked into {printable(name)}/: it is the only folder of images")
        _leave_out_loose(folder, notes)
        folder = inside
    return folder


def _part_folders(tree: _Folder, notes: list[str]) -> dict[str, _Folder]:
    named: dict[str, list[str]] = {}
    for name in tree.folders:
        if (part := part_of(name)) is not None:
            named.setdefault(part, []).append(name)
    others = [name for name in tree.folders if part_of(name) is None]
    place = printable(str(tree.path))
    if "train" not in named:
        if len(tree.folders) > 1 and not others:
            raise UserError(
                f"{place} has {_listed(tree.folders)} and no train/: name the folder of training "
                "images train, or set data.root to the folder that holds the images to train on"
            )
        return {"train": tree}
    if others and len(named) == 1 and not tree.folders[named["train"][0]].folders:
        return {"train": tree}  # a class of trains
    for part, names in named.items():
        if len(names) > 1:
            raise UserError(
                f"{place} has {_listed(names)}, and each may be the {part} part: rename all but one"
            )
    _leave_out_loose(tree, notes)
    if others:
        found = sum(len(tree.folders[name]) for name in others)
        notes.append(f"left out {_listed(others)}, {_count(found)}: not named as a part")
    return {part: tree.folders[names[0]] for part, names in named.items()}


def _classes(train: _Folder, notes: list[str]) -> list[str] | None:
    if len(train.folders) > 1:
        return list(train.folders)
    for name in train.folders:
        notes.append(f"took {printable(name)}/ with the images beside it: one folder is no classes")
    return None


def _labelled(folder: _Folder, classes: list[str] | None, notes: list[str]) -> list[Image]:
    if classes is None:
        return [Image(path) for path in folder.all_images()]
    _leave_out_loose(folder, notes)
    numbers = {name: i for i, name in enumerate(classes)}
    return [Image(p, numbers[n]) for n, f in folder.folders.items() for p in f.all_images()]


def _other_part(
    folder: _Folder, classes: list[str] | None, train: _Folder, notes: list[str]
) -> list[Image]:
    """The images of val/ or test/ that can be judged by what train/ holds."""
    if classes is not None and len(folder.folders) == 1:
        ((name, inside),) = folder.folders.items()
        if name not in classes and inside.folders.keys() & set(classes):
            folder = _unwrapped(folder, notes)
    known = set(classes or train.folders)
    unknown = sorted(folder.folders.keys() - known)
    if known and unknown:
        path = printable(str(folder.path))
        raise UserError(
            f"{path} has classes that train/ has not: {[printable(name) for name in unknown]}"
        )
    return _labelled(folder, classes, notes)


def _leave_out_loose(folder: _Folder, notes: list[str]) -> None:
    if folder.images:
        place = printable(folder.path.name)
        notes.append(
            f"left out {_count(len(folder.images))} of {place}/, "
            f"{printable(folder.images[0].name)} the first: in none of its folders"
        )


def part_of(name: str) -> str | None:
    """The part that a folder's name says: "train", "val" or "test".

    Example:
        >>> [part_of(name) for name in ("Training", "test_set", "valid", "val2017", "cat")]
        ['train', 'test', 'val', 'val', None]
    """
    for part, pattern in PARTS.items():
        if re.fullmatch(PART_NAME.format(pattern), name, re.IGNORECASE):
            return part
    return None


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"{printable(name)}/" for name in names)


def _count(images: int) -> str:
    return f"{images:,} image" + ("" if images == 1 else "s")
