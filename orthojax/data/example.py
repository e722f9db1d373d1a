"""Records of prepared sets, read without TFDS: `tf.train.Example` in the protobuf wire format.

TFDS's own reader takes about twice the time for a record, and every worker process would have to
import it.
"""

from collections.abc import Iterator


def parse_example(record: bytes) -> dict[str, memoryview | int]:
    """The features of a serialized `tf.train.Example` that hold one value each.

    Args:
      record: what an `array_record` file of TFDS holds for an example. `ValueError` if it is not
        such a message.

    Returns:
      Bytes features as memoryviews of the record, integer features as integers; others, and those
      of no value or of several, are left out.

    Example:
      >>> record = b"\\n\\x10\\n\\x0e\\n\\x05label\\x12\\x05\\x1a\\x03\\n\\x01\\x07"
      >>> parse_example(record)
      {'label': 7}
    """
    try:
        return dict(_features(memoryview(record)))
    except (IndexError, ValueError):
        raise ValueError(f"not a tf.train.Example: {record[:20]!r}...") from None


# Field numbers: Example.features 1; Features.feature 1, a map of entries with key 1 and value 2;
# Feature is one of bytes_list 1, float_list 2, int64_list 3, which hold their values in 1.
def _features(example: memoryview) -> Iterator[tuple[str, memoryview | int]]:
    for _, features in _fields(example):
        for _, entry in _fields(features):
            key, feature = (content for _, content in _fields(entry))
            for kind, values in _fields(feature):
                found = [content for _, content in _fields(values)]
                if kind == 1 and len(found) == 1:
                    yield str(key, "utf-8"), found[0]
                elif kind == 3 and len(found) == 1:
                    value, end = _varint(found[0], 0)
                    if end == len(found[0]):  # these are packed, so there may be more
                        yield str(key, "utf-8"), value - (1 << 64) if value >> 63 else value


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message, all of the length-delimited kind: their numbers and contents."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        length, position = _varint(message, position)
        if tag & 7 != 2 or position + length > len(message):
            raise ValueError
        yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
