"""Reading photographs with Grain: worker processes that decode, and batches put together here.

Each host has a stream of its own: the rows of every global batch that are its part, one after the
other. Grain's workers turn it into chunks, taking turns, and the chunks come out in order whatever
the number of workers. Grain's own shuffle is not used: `Order` is the same for ever and for data in
memory, and any position of it is found without going there, so that a position is all the state
there is.
"""

import dataclasses
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from orthojax.data import photographs
from orthojax.data.interface import Batch
from orthojax.data.order import Order, check_batch_size
from orthojax.data.orphans import end_with_parent
from orthojax.data.records import Records
from orthojax.errors import DatasetError

# Images that a worker sends at a time: few enough that their memory is used again, and not asked
# of the operating system each time; and that a batch is shared out evenly.
CHUNK = 8

# After so many images in a row that cannot be decoded it is the set that is broken.
PATIENCE = 100

_ENDLESS = 2**48


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How photographs become arrays: resized to a square of `resize`, of which `crop` is cut."""

    resize: int
    crop: int


@dataclasses.dataclass(frozen=True)
class Place:
    """One row of a batch: which image, and where its crop begins; image -1 is padding."""

    image: int
    left: int
    top: int


class TrainStream:
    """Random access to a host's part of the training stream, a `grain.MapDataset` source.

    Args:
      records: of the training split.
      geometry: see there.
      order: of the images.
      batch_size: rows of a global batch.
      rows: which of them are this host's, int (R,).
      position: where in the global stream the first batch begins.
    """

    def __init__(
        self,
        records: Records,
        geometry: Geometry,
        order: Order,
        batch_size: int,
        rows: np.ndarray,
        position: int,
    ):
        self._records = records
        self._offsets = geometry.resize - geometry.crop + 1
        self._order = order
        self._batch_size = batch_size
        self._rows = rows
        self._position = position

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> tuple[Place, memoryview | bytes, int]:
        batch, row = divmod(int(index), len(self._rows))
        position = self._position + batch * self._batch_size + int(self._rows[row])
        left, top = self._order.random_words(position, 2) % self._offsets
        place = Place(self._order.image(position), int(left), int(top))
        return place, *self._records[place.image]


class EvalStream:
    """A host's part of one padded pass over a split, likewise; crops are in the centre."""

    def __init__(self, records: Records, geometry: Geometry, batch_size: int, rows: np.ndarray):
        self._records = records
        self._margin = (geometry.resize - geometry.crop) // 2
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return -(-len(self._records) // self._batch_size) * len(self._rows)

    def __getitem__(self, index: int) -> tuple[Place, memoryview | bytes, int]:
        batch, row = divmod(int(index), len(self._rows))
        image = batch * self._batch_size + int(self._rows[row])
        if image >= len(self._records):
            return Place(-1, 0, 0), b"", 0
        return Place(image, self._margin, self._margin), *self._records[image]


class Decode:
    """Turns a chunk of encoded images into arrays; what cannot be decoded is counted.

    Args:
      records: where a substitute for an undecodable image is taken from: the next image that can
        be decoded, with its label; None leaves a black image of mask 0.
      geometry: see there.

    Called with a list of what `TrainStream` or `EvalStream` give, it returns
    `{"image": uint8 (N, crop, crop, 3), "label": int32 (N,), "mask": float32 (N,),
    "undecodable": int64 (N,)}`; the last is the index of the image that could not be decoded, or
    -1 where it could.
    """

    def __init__(self, records: Records | None, geometry: Geometry):
        self._records = records
        self._geometry = geometry

    def __call__(self, chunk: list[tuple[Place, memoryview | bytes, int]]) -> Batch:
        count, crop = len(chunk), self._geometry.crop
        batch = {
            "image": np.zeros((count, crop, crop, 3), np.uint8),
            "label": np.zeros(count, np.int32),
            "mask": np.zeros(count, np.float32),
            "undecodable": np.full(count, -1, np.int64),
        }
        for row, (place, encoded, label) in enumerate(chunk):
            if place.image >= 0:
                self._fill(batch, row, place, encoded, label)
        return batch

    def _fill(self, batch: Batch, row: int, place: Place, encoded: Any, label: int) -> None:
        for step in range(PATIENCE):
            try:
                photographs.crop_into(
                    batch["image"][row], encoded, self._geometry.resize, place.left, place.top
                )
            except photographs.UndecodableError:
                batch["undecodable"][row] = place.image
                if self._records is None:
                    return
                encoded, label = self._records[(place.image + step + 1) % len(self._records)]
            else:
                batch["label"][row], batch["mask"][row] = label, 1
                return
        raise DatasetError(
            f"{PATIENCE} images in a row, from number {place.image} of split "
            f"{self._records.split!r} in {self._records.directory}, cannot be decoded; remove that "
            "directory and prepare the set again"
        )


class Chunks:
    """An iterator of rows out of worker processes, which start with the first of them.

    Args:
      stream: `TrainStream` or `EvalStream`.
      decode: applied to chunks of it.
      workers: number of processes; 0 decodes in a thread of this one.
      threads: chunks that each of them works on at a time.
    """

    def __init__(self, stream: Any, decode: Decode, workers: int, threads: int):
        chunks = grain.MapDataset.source(stream).batch(CHUNK, batch_fn=list).map(decode)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        chunks = chunks.to_iter_dataset(options)
        if workers:
            _allow_unparsed_flags()
            _end_workers_soon()
            # Through pipes: shared memory is no faster here, runs out where a container has 64 MiB
            # of it, and is left behind by what is killed.
            no_shared_memory = grain.experimental.DatasetOptions(min_shm_size=2**62)
            chunks = grain.experimental.WithOptionsIterDataset(chunks, no_shared_memory)
            chunks = chunks.mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(num_workers=workers),
                worker_init_fn=_start_worker,
            )
        self._iterator = iter(chunks)
        self._left: Batch | None = None  # rows that no batch has had yet

    def take(self, count: int) -> Batch:
        """The next `count` rows, in new arrays; `StopIteration` where there are none left."""
        pieces, missing = [], count
        while missing:
            chunk = self._left if self._left is not None else next(self._iterator)
            piece = {name: array[:missing] for name, array in chunk.items()}
            rest = {name: array[missing:] for name, array in chunk.items()}
            self._left = rest if len(rest["label"]) else None
            pieces.append(piece)
            missing -= len(piece["label"])
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator.close()


def _allow_unparsed_flags() -> None:
    """Grain 0.2.18 asks for a flag of its own, an error where absl has parsed no command line."""
    name = "grain_enable_multiprocess_worker_profiling"
    if name in flags.FLAGS and not flags.FLAGS.is_parsed():
        flags.FLAGS[name].present = 1


def _end_workers_soon() -> None:
    """Grain 0.2.18 gives a worker 25 s to get rid of its last chunks, which nobody reads."""
    found = sys.modules.get("grain._src.python.dataset.transformations.process_prefetch")
    if hasattr(found, "_PROCESS_KILL_TIMEOUT_S"):  # else closing takes longer, and that is all
        found._PROCESS_KILL_TIMEOUT_S = 0.5


def _start_worker(index: int, count: int) -> None:
    """Prepares a worker process, before it reads anything."""
    del index, count
    import cv2

    # A Ctrl-C or a scheduler's SIGTERM reaches the whole group; when to stop is the parent's to
    # say, which first saves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    cv2.setNumThreads(1)


class StreamedTrainIterator:
    """Training batches of photographs; see `orthojax.data.TrainBatches`.

    Args:
      records: of the training split.
      geometry: see there.
      batch_size: rows of a global batch.
      seed: of the order of the images and of their crops.
      rows: which rows of a batch to give; None is all.
      workers: see `Chunks`.
      threads: see `Chunks`.
    """

    def __init__(
        self,
        records: Records,
        geometry: Geometry,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None,
        *,
        workers: int,
        threads: int,
    ):
        check_batch_size(batch_size, len(records))
        self._records = records
        self._geometry = geometry
        self._batch_size = batch_size
        self._rows = np.arange(batch_size) if rows is None else rows
        self._order = Order(seed, len(records))
        self._processes = {"workers": workers, "threads": threads}
        self._position = 0
        self._chunks: Chunks | None = None
        self._undecodable = _Undecodable(records, "replaced by the next")

    def __iter__(self) -> "StreamedTrainIterator":
        return self

    def __next__(self) -> Batch:
        if self._chunks is None:
            stream = TrainStream(
                self._records,
                self._geometry,
                self._order,
                self._batch_size,
                self._rows,
                self._position,
            )
            decode = Decode(self._records, self._geometry)
            self._chunks = Chunks(stream, decode, **self._processes)
        batch = self._chunks.take(len(self._rows))
        epoch = self._position // self._order.size
        self._position += self._batch_size
        self._undecodable.add(batch.pop("undecodable"))
        if self._position // self._order.size > epoch:
            self._undecodable.report(f"in epoch {epoch}")
        return {"image": batch["image"], "label": batch["label"]}

    def get_state(self) -> dict[str, int]:
        """See `orthojax.data.TrainBatches`."""
        return self._order.state(self._position)

    def set_state(self, state: dict[str, Any]) -> None:
        """See `orthojax.data.TrainBatches`. What the workers had prepared is thrown away."""
        position = self._order.position(state)
        self.close()
        self._position = position

    def close(self) -> None:
        """Ends the worker processes; a later `next` starts others, and goes on."""
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None


def streamed_test_batches(
    records: Records,
    geometry: Geometry,
    batch_size: int,
    rows: np.ndarray | None,
    *,
    workers: int,
    threads: int,
) -> Iterator[Batch]:
    """One pass over a split in its own order, with centre crops; see `orthojax.data.Dataset`.

    An image that cannot be decoded counts as padding, with a warning.

    Args:
      records: of the split; for the others see `StreamedTrainIterator`.
    """
    check_batch_size(batch_size)
    wanted = np.arange(batch_size) if rows is None else rows
    return _padded_batches(records, geometry, batch_size, wanted, workers, threads)


def _padded_batches(records, geometry, batch_size, rows, workers, threads) -> Iterator[Batch]:
    stream = EvalStream(records, geometry, batch_size, rows)
    workers = min(workers, -(-len(stream) // CHUNK))
    chunks = Chunks(stream, Decode(None, geometry), workers, threads)
    undecodable = _Undecodable(records, "left out")
    try:
        for _ in range(len(stream) // len(rows)):
            batch = chunks.take(len(rows))
            undecodable.add(batch.pop("undecodable"))
            yield batch
    finally:
        chunks.close()
    undecodable.report("in this pass")


class _Undecodable:
    """Counts the images that could not be decoded, and tells the user."""

    def __init__(self, records: Records, what_is_done: str):
        self._where = f"split {records.split!r} in {records.directory}"
        self._what_is_done = what_is_done
        self._count = 0
        self._told = False

    def add(self, images: np.ndarray) -> None:
        """Takes note of the indices that are not -1, and tells of the first at once."""
        found = images[images >= 0]
        self._count += len(found)
        if len(found) and not self._told:
            self._told = True
            warnings.warn(
                f"image number {found[0]} of {self._where} cannot be decoded and is "
                f"{self._what_is_done}; if there are more, their count follows",
                stacklevel=3,
            )

    def report(self, when: str) -> None:
        """Tells how many there were since the last report."""
        if self._count > 1:
            warnings.warn(
                f"{when} {self._count:,} images of {self._where} could not be decoded and were "
                f"{self._what_is_done}",
                stacklevel=3,
            )
        self._count = 0
