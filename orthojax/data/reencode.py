"""Photographs re-encoded once as small squares, so that training decodes less every epoch."""

import contextlib
import datetime
import importlib.util
import itertools
import json
import math
import os
import pathlib
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from orthojax.cores import usable_cores
from orthojax.data import encoder, prepare, source
from orthojax.data.records import Records
from orthojax.errors import DatasetError
from orthojax.progress import is_terminal, tell

PACKAGES = ("simplejpeg", "cv2")  # of the extra `imagenet`

_LIVE_SECONDS, _LOG_SECONDS = 1.0, 60.0
_CLEAR_LINE = "\r\x1b[K"


def reencode(
    name: str,
    size: int,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    *,
    quality: int = 95,
    workers: int | None = None,
) -> str:
    """Writes a set of photographs again, each resized to a square and encoded as JPEG.

    `imagenet2012` becomes `imagenet2012_256` in the same data directory, with the same splits,
    order, labels and other features; it is prepared first if need be. The photographs are decoded
    and resized as training does it (`orthojax.data.photographs`), and encoded with colours at full
    resolution (4:4:4). One that cannot be decoded is left out, with a warning and a count. The
    files do not depend on the number of workers. They are written into a directory beside
    their own, which is renamed at the end; so what is interrupted leaves nothing that looks
    prepared. A set that is prepared already is left as it is.

    With more than one worker the main module of the program is imported by each of them, as
    Python's `multiprocessing` does it: scripts need `if __name__ == "__main__":`.

    Args:
      name: a TFDS name, such as `imagenet2012` or `imagenet_v2/matched-frequency`.
      size: side of the squares in pixels.
      data_dir: TFDS data directory; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      manual_dir: see `orthojax.data.prepare.prepare`.
      quality: of the JPEGs, 1 to 100.
      workers: processes that decode and encode; None is one for each core this process may use,
        and 1 does it in this process.

    Returns:
      The directory of the new set.

    Raises:
      DatasetError: the set is unknown, not of photographs of many sizes, or cannot be prepared; a
        number is impossible; a package is missing; records are damaged; the new set cannot be
        written, or is there with another quality.

    Example:
      >>> reencode("imagenet2012", 256)  # doctest: +SKIP
      '/home/me/tensorflow_datasets/imagenet2012_256/5.1.0'
    """
    workers = _checked(name, size, quality, workers)
    original = source.find(name, data_dir, prepared=False)
    if None not in original.image_shape:
        height, width, _ = original.image_shape
        raise DatasetError(
            f"images of data set {name!r} are all of {height}x{width} pixels; choose a set of "
            "photographs of many sizes, such as imagenet2012"
        )
    target = _directory(original, size)
    if (target / "dataset_info.json").exists():
        _check_quality(target, quality)
        return str(target)
    prepare.prepare(name, data_dir, manual_dir)
    try:
        _write_whole(source.find(name, data_dir), target, size, quality, workers)
    except OSError as error:
        raise DatasetError(
            f"cannot write {target}: {error}; make room, or have {name!r} in a data_dir that can "
            "be written"
        ) from error
    return str(target)


def _checked(name: str, size: int, quality: int, workers: int | None) -> int:
    if workers is None:
        workers = usable_cores()
    if size < 1:
        raise DatasetError(f"resize={size} of data set {name!r} is less than 1 pixel")
    if not 1 <= quality <= 100:
        raise DatasetError(f"quality={quality} of JPEGs is not from 1 to 100; 95 is usual")
    if workers < 1:
        raise DatasetError(f"workers={workers} is less than 1")
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise DatasetError(
            f"re-encoding {name!r} needs {', '.join(missing)}; install what is missing with\n"
            "    pip install -e '.[imagenet]'"
        )
    return workers


def _directory(original: source.Source, size: int) -> pathlib.Path:
    """`DATA_DIR/NAME_SIZE/[CONFIG/]VERSION`, where `original` is `DATA_DIR/NAME/[CONFIG/]VERSION`.

    TFDS's own `data_dir_root` is another directory where a set is read without its code.
    """
    name, *rest = original.full_name.split("/")
    if "://" in original.directory:
        raise DatasetError(
            f"{original.directory} is in an object store; re-encode {name!r} on a disk, and copy "
            "the result there"
        )
    root = pathlib.Path(original.directory).parents[len(rest)]
    return root.joinpath(source.reencoded_name(name, size), *rest)


def _check_quality(target: pathlib.Path, quality: int) -> None:
    try:
        found = json.loads((target / "metadata.json").read_text())["quality"]
    except (OSError, ValueError, KeyError):
        raise DatasetError(
            f"{target} holds a set that was not written by re-encoding; remove that directory, or "
            "choose another size"
        ) from None
    if found != quality:
        raise DatasetError(
            f"{target} is there with quality={found}, not {quality}; remove that directory to "
            f"write it again, or ask for --quality={found}"
        )


def _write_whole(
    original: source.Source, target: pathlib.Path, size: int, quality: int, workers: int
) -> None:
    for left in target.parent.glob(f"{target.name}.incomplete.*"):
        warnings.warn(
            f"{left} is of a run that was killed, or of one that is still under way; remove it "
            "if there is none",
            stacklevel=3,
        )
    temporary = target.with_name(f"{target.name}.incomplete.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        _write(original, temporary, target, size, quality, workers)
        _copy_default_config(original, target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.removedirs(target.parent)  # as far as they are empty
        raise


def _copy_default_config(original: source.Source, target: pathlib.Path) -> None:
    """Copies the file by which TFDS knows which config is meant where none is named."""
    if original.builder.builder_config is not None:
        metadata = pathlib.Path(original.directory).parents[1] / ".config"
        if metadata.is_dir():
            shutil.copytree(metadata, target.parents[1] / ".config", dirs_exist_ok=True)


def _write(
    original: source.Source,
    directory: pathlib.Path,
    target: pathlib.Path,
    size: int,
    quality: int,
    workers: int,
) -> None:
    """Writes records and metadata into `directory`, from which they will be renamed to `target`."""
    import tensorflow_datasets as tfds

    name = source.reencoded_name(original.full_name.split("/")[0], size)
    shards = {
        split: info.shard_lengths
        for split, info in original.builder.info.splits.items()
        if info.num_examples
    }
    records = {split: source.records(original, split) for split in shards}
    encode = encoder.Encoder(records, size, quality)
    progress = _Progress(name, sum(map(len, records.values())))
    splits = []
    with contextlib.closing(encoder.encoded_chunks(encode, shards, workers)) as chunks:
        for split, counts in shards.items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
            )
            undecodable = _Undecodable(records[split])
            lengths, total = [], 0
            for shard, count in enumerate(counts):
                path = template.sharded_filepath(shard_index=shard, num_shards=len(counts))
                own = itertools.islice(chunks, math.ceil(count / encoder.CHUNK))
                kept, written = _write_shard(os.fspath(path), own, undecodable, progress)
                lengths.append(kept)
                total += written
            undecodable.report(sum(lengths))
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=total,
                    filename_template=template.replace(data_dir=target),
                )
            )
    progress.close()
    _info(original, name, target, size, quality, splits).write_to_directory(directory)


def _write_shard(
    path: str, chunks: Iterator[tuple[range, list[bytes | None]]], undecodable: Any, progress: Any
) -> tuple[int, int]:
    """The number of records written, and that of their bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = total = 0
    with _write_errors_as_os_errors():
        writer = ArrayRecordWriter(path, "group_size:1")
    for rows, chunk in chunks:
        records = [record for record in chunk if record is not None]
        undecodable.add([row for row, record in zip(rows, chunk, strict=True) if record is None])
        with _write_errors_as_os_errors():
            for record in records:
                writer.write(record)
        count += len(records)
        total += sum(map(len, records))
        progress.add(len(rows))
    with _write_errors_as_os_errors():
        writer.close()
    return count, total


@contextlib.contextmanager
def _write_errors_as_os_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # array_record's only one
        raise OSError(str(error)) from error


def _info(
    original: source.Source,
    name: str,
    target: pathlib.Path,
    size: int,
    quality: int,
    splits: list[Any],
) -> Any:
    """The `tfds.core.DatasetInfo` of the new set: the original's, but for what is new."""
    import tensorflow_datasets as tfds

    old = original.builder.info
    config = original.builder.builder_config
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=name,
            version=old.version,
            data_dir=str(target),
            module_name=__name__,
            config_name=config.name if config else None,
        ),
        description=(
            f"{old.full_name}, its images resized to {size}x{size} pixels and encoded as JPEG of "
            f"quality {quality}.\n\n{old.description}"
        ),
        # Of no size in particular, so that the set is streamed as the original is.
        features=tfds.features.FeaturesDict(
            {
                **dict(old.features.items()),
                original.image_key: tfds.features.Image(
                    shape=(None, None, 3), encoding_format="jpeg"
                ),
            }
        ),
        supervised_keys=(original.image_key, original.label_key),
        homepage=old.homepage,
        citation=old.citation,
        metadata=tfds.core.MetadataDict(size=size, quality=quality),
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    return info


class _Undecodable:
    """Tells of images of a split that are left out: of the first at once, of their number last."""

    def __init__(self, records: Records):
        self._where = f"split {records.split!r} in {records.directory}"
        self._count = 0

    def add(self, rows: list[int]) -> None:
        if rows and not self._count:
            warnings.warn(
                f"image number {rows[0]} of {self._where} cannot be decoded and is left out; the "
                "count follows",
                stacklevel=2,
            )
        self._count += len(rows)

    def report(self, kept: int) -> None:
        if not kept:
            raise DatasetError(
                f"not one image of {self._where} can be decoded; remove that directory and "
                "prepare the set again"
            )
        if self._count:
            warnings.warn(
                f"{self._count:,} of {self._count + kept:,} images of {self._where} could not be "
                "decoded and are left out",
                stacklevel=2,
            )


class _Progress:
    """A live line on a terminal; elsewhere one a minute."""

    def __init__(self, name: str, total: int):
        self._name = name
        self._total = total
        self._done = 0
        self._live = is_terminal(sys.stderr)
        self._start = time.monotonic()
        self._due = self._start + self._period()

    def _period(self) -> float:
        return _LIVE_SECONDS if self._live else _LOG_SECONDS

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._period()
            rate = self._done / (now - self._start)
            left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
            self._show(
                f"{self._done:,} of {self._total:,} images, {rate:,.0f} images/s, {left} left",
                last=False,
            )

    def close(self) -> None:
        """Tells how long it took."""
        seconds = time.monotonic() - self._start
        self._show(f"{self._total:,} images in {seconds:,.1f} s", last=True)

    def _show(self, text: str, last: bool) -> None:
        begin = _CLEAR_LINE if self._live else ""
        end = "" if self._live and not last else "\n"
        tell(f"{begin}{self._name}: {text}", end=end)
