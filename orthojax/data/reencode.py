"""Photographs re-encoded once as small squares, so that training decodes less every epoch."""

import functools
import pathlib
import tempfile

import tensorflow_datasets as tfds

from orthojax import checks
from orthojax.data import prepare, prepared
from orthojax.data.records import Undecodable
from orthojax.data.streamed import LARGEST_SIDE
from orthojax.errors import DatasetError
from orthojax.extras import require
from orthojax.parallel.cores import usable_cores


class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of another set's images as squares; all else is the original's, its order too.

    Args:
      original: what is re-encoded.
      size: side of the squares in pixels.
      quality: of the JPEGs, 1 to 100.
      workers: threads that decode and encode.
    """

    url_infos = {}  # see `orthojax.data.bundled`

    def __init__(self, original: prepared.Source, size: int, quality: int, workers: int):
        name, *rest = original.full_name.split("/")
        self.name = prepared.reencoded_name(name, size)
        self.VERSION = original.builder.version
        config = original.builder.builder_config
        if config is not None:
            self.BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config.name)]
        self._original = original
        self._size = size
        self._quality = quality
        self._workers = workers
        # Not TFDS's `data_dir_root`, which is another where a set is read without its code.
        root = pathlib.Path(original.directory).parents[len(rest)]
        super().__init__(data_dir=root, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        old, key = self._original.builder.info, self._original.image_key
        # Of no size in particular, so that the set is streamed as the original is.
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"{old.full_name}, its images resized to {self._size}x{self._size} pixels and "
                f"encoded as JPEG of quality {self._quality}.\n\n{old.description}"
            ),
            features=tfds.features.FeaturesDict({**dict(old.features.items()), key: image}),
            supervised_keys=(key, self._original.label_key),
            homepage=old.homepage,
            citation=old.citation,
            metadata=tfds.core.MetadataDict(size=self._size, quality=self._quality),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        splits = self._original.builder.info.splits
        return {s: self._generate_examples(s) for s, info in splits.items() if info.num_examples}

    def _generate_examples(self, split):
        import grain

        records = prepared.records(self._original, split)
        decoders = {self._original.image_key: tfds.decode.SkipDecoding()}
        examples = self._original.builder.as_data_source(split=split, decoders=decoders)
        square = functools.partial(self._square, examples)
        squares = grain.MapDataset.range(len(records)).map(square)
        options = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=64)
        undecodable, kept = Undecodable(records, "left out"), 0
        for row, example in squares.to_iter_dataset(options):
            if example is None:
                undecodable.add([row])
            else:
                kept += 1
                yield row, example
        undecodable.report("in all")
        if not kept:
            raise DatasetError(
                f"not one image of split {split!r} in {records.directory} can be decoded; remove "
                "that directory and prepare the set again"
            )

    def _square(self, examples, row):
        import simplejpeg

        from orthojax.data import jpeg

        try:
            example = examples[row]
        except Exception as error:  # no such file, too short, wrong hash; no example of this set
            raise DatasetError(
                f"the records in {self._original.directory} are damaged or incomplete ({error}); "
                "remove that directory and prepare the set again"
            ) from error
        key = self._original.image_key
        try:
            image = jpeg.decode(example[key], at_least=self._size)
        except jpeg.UndecodableError:
            return row, None
        image = jpeg.resize(image, self._size)
        encoded = simplejpeg.encode_jpeg(image, self._quality, "RGB", "444", fastdct=False)
        return row, {**example, key: encoded}


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
    and resized as training does it (`orthojax.data.jpeg`), and encoded with colors at full
    resolution (4:4:4). One that cannot be decoded is left out, with a warning and a count. TFDS
    writes into a directory of its own that it renames at the end, so an interrupted run leaves
    nothing that looks prepared. A set that is prepared already is left as it is.

    Args:
      name: a TFDS name, such as `imagenet2012` or `imagenet_v2/matched-frequency`.
      size: side of the squares in pixels.
      data_dir: TFDS data directory; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      manual_dir: see `orthojax.data.prepare.prepare`.
      quality: of the JPEGs, 1 to 100.
      workers: threads that decode and encode; None is one for each core this process may use.

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
    if workers is None:
        workers = usable_cores()
    _check_numbers(name, size, quality, workers)
    original = prepared.find(name, data_dir, prepared=False)
    if None not in original.image_shape:
        height, width, _ = original.image_shape
        raise DatasetError(
            f"images of data set {name!r} are all of {height}x{width} pixels; choose a set of "
            "photographs of many sizes, such as imagenet2012"
        )
    builder = Squares(original, size, quality, workers)
    if not prepared.is_prepared(builder):
        prepare.prepare(name, data_dir, manual_dir)
        builder = Squares(prepared.find(name, data_dir), size, quality, workers)
        _write(builder)
    elif (found := (builder.info.metadata or {}).get("quality")) != quality:
        raise DatasetError(
            f"{builder.data_path} is there with quality={found}, not {quality}; remove that "
            f"directory to write it again, or ask for --quality={found}"
        )
    return str(builder.data_path)


def _check_numbers(name: str, size: int, quality: int, workers: int) -> None:
    checks.integer("size", size, 1, LARGEST_SIDE)
    checks.integer("quality", quality, 1, 100)
    checks.integer("workers", workers, 1)
    require("imagenet", f"re-encoding {name!r}")


def _write(builder: Squares) -> None:
    import cv2

    cv2.setNumThreads(1)  # the photographs have one each
    try:
        with tempfile.TemporaryDirectory() as downloads:  # which TFDS makes, and leaves empty
            builder.download_and_prepare(download_dir=downloads)
    except (OSError, RuntimeError) as error:  # the second is array_record's
        raise DatasetError(
            f"cannot write {builder.data_path}: {error}; make room, or have the original in a "
            "data_dir that can be written"
        ) from error
