"""Reading photographs with Grain: worker processes that decode, and batches put together here.

Each host has a stream of its own: the rows of every global batch that are its part, one after the
other. Grain's workers decode it in chunks, taking turns, and the chunks come out in order whatever
the number of workers. The order is `orthojax.data.sampler`'s, as of images in memory, and not
Grain's: any position is found without going there, so that a position is all the state there is,
and `shuffle().repeat().random_map()` takes three times as long for an image.
"""

import dataclasses
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from orthojax.data import jpeg, sampler
from orthojax.data.protocols import Batch
from orthojax.data.records import PATIENCE, Records, Undecodable, all_broken
from orthojax.data.worker_lifetime import end_with_parent

# Images that a worker sends at a time: few enough that their memory is used again, and not asked
# of the operating system each time; and that a batch is shared out evenly.
CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How photographs become arrays: resized to a square of `resize`, of which `crop` is cut."""

    resize: int
    crop: int


# An image, and the left and upper edge of its crop; image -1 is padding.
Place = tuple[int, int, int]


def train_place(seed: int, size: int, geometry: Geometry, position: int) -> Place:
    """What stands at a position of the endless training stream of `size` images."""
    offsets = geometry.resize - geometry.crop + 1
    left, top = sampler.random_words(seed, size, position, 2) % offsets
    return sampler.image(seed, size, position), int(left), int(top)


def evaluation_place(size: int, geometry: Geometry, position: int) -> Place:
    """Likewise of one pass in the images' own order; crops are in the center."""
    margin = (geometry.resize - geometry.crop) // 2
    return position if position < size else -1, margin, margin


class Rows:
    """A host's rows of every batch, one after the other: a source of Grain's.

    Args:
      place: what stands at a position of the stream.
      batch_size: rows of a global batch.
      rows: which of them are this host's, int (R,).
      start: position of the first batch.
      batches: how many there are.
    """

    def __init__(
        self,
        place: Callable[[int], Place],
        batch_size: int,
        rows: np.ndarray,
        start: int = 0,
        batches: int = 2**40,
    ):
        self._place = place
        self._batch_size = batch_size
        self._rows = rows.tolist()
        self._start = start
        self._batches = batches

    def __len__(self) -> int:
        return self._batches * len(self._rows)

    def __getitem__(self, index: int) -> Place:
        batch, row = divmod(int(index), len(self._rows))
        return self._place(self._start + batch * self._batch_size + self._rows[row])


class Decode:
    """Turns a chunk of places into arrays; what cannot be decoded is counted.

    Args:
      records: of the split.
      geometry: see there.
      replace: whether the next image that can be decoded takes the place of one that cannot, with
        its label; else that stays a black image of mask 0.

    Called with the places of N images it returns
    `{"image": uint8 (N, crop, crop, 3), "label": int32 (N,), "mask": float32 (N,),
    "undecodable": int64 (N,)}`; the last is the index of the image that could not be decoded, or
    -1 where it could.
    """

    def __init__(self, records: Records, geometry: Geometry, *, replace: bool):
        self._records = records
        self._geometry = geometry
        self._attempts = PATIENCE if replace else 1

    def __call__(self, places: list[Place]) -> Batch:
        count, crop = len(places), self._geometry.crop
        batch = {
            "image": np.zeros((count, crop, crop, 3), np.uint8),
            "label": np.zeros(count, np.int32),
            "mask": np.zeros(count, np.float32),
            "undecodable": np.full(count, -1, np.int64),
        }
        for row, (image, left, top) in enumerate(places):
            if image >= 0:
                self._fill(batch, row, image, left, top)
        return batch

    def _fill(self, batch: Batch, row: int, image: int, left: int, top: int) -> None:
        for step in range(self._attempts):
            encoded, label = self._records[(image + step) % len(self._records)]
            try:
                jpeg.crop_into(batch["image"][row], encoded, self._geometry.resize, left, top)
            except jpeg.UndecodableError as error:
                batch["undecodable"][row] = image
                reason = error
            else:
                batch["label"][row], batch["mask"][row] = label, 1
                return
        if self._attempts > 1:
            raise all_broken(self._records, image, self._attempts, reason)


def decoded_batches(rows: Rows, decode: Decode, size: int, workers: int, threads: int) -> Any:
    """An iterator of decoded batches out of worker processes, to be closed.

    Args:
      rows: this host's.
      decode: applied to chunks of them.
      size: rows of a batch.
      workers: number of processes, which start with the first batch; 0 decodes in a thread of this
        one.
      threads: chunks that each of them works on at a time.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    chunks = grain.MapDataset.source(rows).batch(CHUNK, batch_fn=list)
    chunks = chunks.map(decode).to_iter_dataset(options)
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
    return iter(grain.experimental.RebatchIterDataset(chunks, size))


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


class StreamedTrainIterator(sampler.Resumable):
    """Training batches of photographs; see `orthojax.data.TrainBatches`.

    Args:
      records: of the training split.
      geometry: see there.
      batch_size: rows of a global batch.
      seed: of the order of the images and of their crops.
      rows: which rows of a batch to give; None is all.
      workers: see `decoded_batches`.
      threads: see `decoded_batches`.
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
        self._rows = sampler.check_batch(batch_size, rows, len(records))
        super().__init__(seed, len(records), records.digest)
        sampler.images(seed, len(records), 0, 1)  # a negative seed is an error here
        self._place = functools.partial(train_place, seed, len(records), geometry)
        self._decode = Decode(records, geometry, replace=True)
        self._batch_size = batch_size
        self._processes = {"workers": workers, "threads": threads}
        self._batches: Any = None
        self._undecodable = Undecodable(records, "replaced by the next")

    def __next__(self) -> Batch:
        if self._batches is None:
            rows = Rows(self._place, self._batch_size, self._rows, start=self._position)
            self._batches = decoded_batches(rows, self._decode, len(self._rows), **self._processes)
        batch = next(self._batches)
        epoch = self._position // self._size
        self._position += self._batch_size
        self._undecodable.add(batch["undecodable"])
        if self._position // self._size > epoch:
            self._undecodable.report(f"in epoch {epoch}")
        return {"image": batch["image"], "label": batch["label"]}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `orthojax.data.TrainBatches`. What the workers had prepared is thrown away."""
        super().set_state(state)
        self.close()

    def close(self) -> None:
        """Ends the worker processes; a later `next` starts others, and goes on."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def one_pass(
    records: Records,
    geometry: Geometry,
    batch_size: int,
    rows: np.ndarray | None,
    *,
    workers: int,
    threads: int,
) -> Iterator[Batch]:
    """One pass over a split in its own order, with center crops; see `orthojax.data.Dataset`.

    An image that cannot be decoded counts as padding, with a warning.

    Args:
      records: of the split; for the others see `StreamedTrainIterator`.

    Raises:
      DatasetError: at the end, not one image of this host's could be decoded.
    """
    wanted = sampler.check_batch(batch_size, rows)
    place = functools.partial(evaluation_place, len(records), geometry)
    count = -(-len(records) // batch_size)
    own = Rows(place, batch_size, wanted, batches=count)
    decode = Decode(records, geometry, replace=False)
    workers = min(workers, -(-len(own) // CHUNK))
    return _one_pass(own, decode, len(wanted), workers, threads, records=records)


def _one_pass(*arguments: Any, records: Records) -> Iterator[Batch]:
    batches, undecodable = decoded_batches(*arguments), Undecodable(records, "left out")
    broken, whole = [], False
    try:
        for batch in batches:
            found = batch.pop("undecodable")
            undecodable.add(found)
            broken += found[found >= 0].tolist()
            whole = whole or batch["mask"].any()
            yield batch
    finally:
        batches.close()
    undecodable.report("in this pass")
    if broken and not whole:
        raise all_broken(records, broken[0], len(broken))
