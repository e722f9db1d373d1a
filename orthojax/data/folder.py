"""Pictures of one's own: a folder for each split, and in it one for each class."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator

from orthojax import checks
from orthojax.caches import expand
from orthojax.console import tell
from orthojax.data.records import check_images
from orthojax.data.streamed import BlackDataset, StreamedDataset, checked_arguments
from orthojax.data.validation import parts
from orthojax.errors import DatasetError
from orthojax.extras import require

TRAIN, TESTS = "train", ("test", "validation", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Files:
    """The pictures of a split, which stand for `orthojax.data.records.Records`.

    Attributes:
      split: name of its folder.
      directory: of the folder.
      paths: of the pictures, below the directory, in ascending order.
      labels: of each.
      class_names: labels are indices into them.
    """

    split: str
    directory: str
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Labels are 0 to `num_classes - 1`."""
        return len(self.class_names)

    @property
    def digest(self) -> str:
        """Hash of the pictures' names in their order, by which a run knows them again."""
        names = "\0".join(self.paths).encode(errors="surrogateescape")
        return hashlib.sha256(names).hexdigest()[:16]

    @property
    def remedy(self) -> str:
        """What to do where pictures are broken."""
        return "put whole pictures in their place, or take them out and start another run"

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        """A picture, for messages."""
        return f"{pathlib.Path(self.directory, self.paths[index])} of split {self.split!r}"

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The content of a file, and its label; `DatasetError` if it is gone."""
        path = pathlib.Path(self.directory, self.paths[index])
        try:
            return path.read_bytes(), self.labels[index]
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}; put it back, or start anew") from error


def load(
    name: str = "folder",
    data_dir: str | None = None,
    *,
    train_split: str = TRAIN,
    test_split: str | None = None,
    validation: int | float = 0,
    resize: int = 256,
    crop: int = 224,
    flip: bool = True,
    color_std: float = 0.1,
    workers: int | None = None,
    threads: int = 1,
    records: bool = True,
) -> StreamedDataset:
    """Opens `DIR/train/CLASS/*.jpg` and `DIR/test/CLASS/*.jpg`, to be read while a net trains.

    The classes are the folders below `train`, in alphabetical order; pictures may lie deeper. Links
    are followed. What is hidden (its name begins with a dot), at any depth, and what has no
    picture's suffix is left out, and stderr says so. A file that cannot be decoded is replaced by
    the next in training and left out in evaluation, and counted.

    Args:
      name: `folder`.
      data_dir: DIR.
      train_split: name of the folder with the training images.
      test_split: of that with the test images; None is `test`, `validation` or `val`, whichever
        there is.
      validation: training pictures to hold out, see `orthojax.data.validation.held_out`.
      resize: see `orthojax.data.streamed.load`, as the following.
      crop: what the net sees, in pixels.
      flip: whether training images are mirrored at random.
      color_std: of the color augmentation; 0 for none.
      workers: processes that decode; None is one for each core.
      threads: of each worker.
      records: False gives black images, for compiling; the folders are looked at for the classes.

    Raises:
      DatasetError: a folder is missing, cannot be read or holds no picture, a link leads nowhere or
        back to where it lies, a class of the test images is none of the training images, there are
        fewer than two, or not one of the first pictures can be decoded.
      ConfigError: an argument is of another kind or out of range.
    """
    require("imagenet", f"reading {name!r}")
    root = _root(data_dir)
    train = files(root, train_split)
    test = files(root, _test_split(root, test_split), train.class_names)
    arguments = checked_arguments(resize, crop, flip, color_std, workers, threads)
    names = train.class_names
    train, held = parts(train, validation)
    made = StreamedDataset if records else BlackDataset
    for pictures in (train, test) if records else ():
        check_images(pictures)
    return made(name, train, test, len(names), class_names=names, validation=held, **arguments)


def files(root: pathlib.Path, split: str, class_names: tuple[str, ...] | None = None) -> Files:
    """Lists the pictures of a split.

    Args:
      root: of all splits.
      split: name of a folder below it.
      class_names: of the training images; None takes those that there are.

    Raises:
      DatasetError: see `load`.
    """
    if not isinstance(split, str) or split in ("", ".") or "\0" in split:
        raise checks.refuse("split", split, f"the name of a folder, such as {TRAIN!r}")
    directory = root / split
    if not directory.is_dir():
        raise DatasetError(
            f"there is no folder {directory}; pictures are looked for as {directory}/CLASS/*.jpg"
        )
    left_out: list[str] = []
    place = _identity(directory)
    found = {
        entry.name: sorted(map(pathlib.Path, _pictures(entry.path, {place}, left_out)))
        for entry in _entries(directory, left_out)
        if _is_folder(entry, left_out)
    }
    _tell(directory, left_out)
    names = tuple(found) if class_names is None else class_names
    if len(names) < 2:
        raise DatasetError(
            f"{directory} holds {len(names)} folders, and a classifier needs two classes at least; "
            f"pictures are looked for as {directory}/CLASS/*.jpg"
        )
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DatasetError(
            f"{directory} has the class {unknown[0]!r}, which training does not have"
        )
    pairs = [
        (os.fspath(path.relative_to(directory)), label)
        for label, name in enumerate(names)
        for path in found.get(name, [])
    ]
    empty = [name for name in found if class_names is None and not found[name]]
    if empty or not pairs:
        where = directory / (empty[0] if empty else "")
        raise DatasetError(f"{where} holds no picture ({', '.join(SUFFIXES)})")
    paths, labels = zip(*pairs, strict=True)
    return Files(split, os.fspath(directory), paths, labels, names)


def _root(data_dir: str | None) -> pathlib.Path:
    if not isinstance(data_dir, str | os.PathLike | None):
        raise checks.refuse("data_dir", data_dir, "the path of a directory")
    if not data_dir:
        raise DatasetError(
            "say where the pictures are: dataset.data_dir=DIR, with DIR/train/CLASS/*.jpg"
        )
    return pathlib.Path(expand(data_dir))


def _test_split(root: pathlib.Path, split: str | None) -> str:
    if split is not None:
        return split
    for name in TESTS:
        if (root / name).is_dir():
            return name
    raise DatasetError(
        f"{root} has no folder {', '.join(TESTS[:-1])} or {TESTS[-1]} beside {TRAIN}; move some "
        "pictures there, or name another by dataset.test_split"
    )


def _pictures(folder: str, above: set[tuple[int, int]], left_out: list[str]) -> Iterator[str]:
    """The pictures below a folder; `above` are those that it lies in."""
    place = _identity(folder)
    if place in above:
        raise DatasetError(f"{folder} is a link back to a folder that it lies in; remove it")
    for entry in _entries(folder, left_out):
        if entry.is_dir():
            yield from _pictures(entry.path, above | {place}, left_out)
        elif pathlib.Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
            yield entry.path
        else:
            left_out.append(entry.path)


def _entries(folder: str | os.PathLike, left_out: list[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder and is not hidden, sorted by name."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{folder}: {error.strerror}; make it readable, or remove it") from error
    left_out += [entry.path for entry in entries if entry.name.startswith(".")]
    seen = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in seen:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise DatasetError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there; bring "
                "that back, or remove the link"
            )
    return seen


def _is_folder(entry: os.DirEntry[str], left_out: list[str]) -> bool:
    if not entry.is_dir():
        left_out.append(entry.path)
    return entry.is_dir()


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _tell(directory: pathlib.Path, left_out: list[str]) -> None:
    if left_out:
        names = [os.path.relpath(path, directory) for path in left_out]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        tell(
            f"{directory}: left out, as hidden or no picture of a class: {', '.join(names[:3])}"
            f"{more}"
        )
