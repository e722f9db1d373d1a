"""Records with their photographs as small squares: what `reencode` has its worker processes do."""

import collections
import concurrent.futures
import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from typing import Any

from orthojax.data.orphans import end_with_parent
from orthojax.data.records import Records
from orthojax.errors import DatasetError

# Photographs that a worker process sends at a time. Each has two such chunks under way at most,
# which is all the memory that a set of any size takes.
CHUNK = 64


class Encoder:
    """Reads records, and gives them back with another image. It travels to worker processes.

    Args:
      records: of each split.
      size: side of the new images, which are squares, in pixels.
      quality: of their JPEGs, 1 to 100.
    """

    def __init__(self, records: Mapping[str, Records], size: int, quality: int):
        self._records = records
        self._size = size
        self._quality = quality
        self._files: tuple[str, Any] | None = None  # of the split that is being read

    def __call__(self, split: str, rows: range) -> list[bytes | None]:
        """Serialized `tf.train.Example`s of the rows, or None where an image is undecodable.

        Raises:
          DatasetError: a record is damaged or missing.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        records = self._records[split]
        if self._files is None or self._files[0] != split:
            self._files = split, ArrayRecordDataSource(records.shards)
        encoded = []
        for row in rows:
            try:
                example = tf_example_pb2.Example.FromString(self._files[1][row])
                [image] = example.features.feature[records.image_key].bytes_list.value
            except (RuntimeError, ValueError, DecodeError) as error:
                raise DatasetError(
                    f"record {row} of split {split!r} in {records.directory} is damaged or missing "
                    f"({error}); remove that directory and prepare the set again"
                ) from error
            square = self._square(image)
            if square is not None:
                example.features.feature[records.image_key].bytes_list.value[0] = square
            encoded.append(square and example.SerializeToString(deterministic=True))
        return encoded

    def _square(self, image: bytes) -> bytes | None:
        import simplejpeg

        from orthojax.data import photographs

        try:
            decoded = photographs.decode(image, at_least=self._size)
        except photographs.UndecodableError:
            return None
        return simplejpeg.encode_jpeg(
            photographs.resize(decoded, self._size), self._quality, "RGB", "444", fastdct=False
        )


def encoded_chunks(
    encoder: Encoder, shards: Mapping[str, list[int]], workers: int
) -> Iterator[tuple[range, list[bytes | None]]]:
    """Every record with its new image, in order, out of worker processes.

    Args:
      encoder: see there.
      shards: numbers of records in the shards of each split; no chunk has rows of two of them.
      workers: processes; 1 does it in this one.

    Yields:
      The rows of a chunk within its split, `CHUNK` of them or less, and what `encoder` gives.
    """
    chunks = _chunks(shards)
    if workers == 1:
        for split, rows in chunks:
            yield rows, encoder(split, rows)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # JAX has threads, which do not survive a fork
        _start_worker,
        (encoder,),
    )
    pending = collections.deque()
    try:
        for split, rows in chunks:
            pending.append((rows, pool.submit(_work, split, rows)))
            if len(pending) == 2 * workers:
                rows, future = pending.popleft()
                yield rows, future.result()
        for rows, future in pending:
            yield rows, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(shards: Mapping[str, list[int]]) -> Iterator[tuple[str, range]]:
    for split, counts in shards.items():
        first = 0
        for count in counts:
            for start in range(first, first + count, CHUNK):
                yield split, range(start, min(start + CHUNK, first + count))
            first += count


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    import cv2

    _worker_encoder = encoder
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
    end_with_parent()


def _work(split: str, rows: range) -> list[bytes | None]:
    return _worker_encoder(split, rows)
