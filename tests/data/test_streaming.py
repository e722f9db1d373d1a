"""Photographs read while a net trains: on records made here, in one process and in workers."""

import dataclasses
import io
import itertools
import pickle
import time

import jax
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("grain")
simplejpeg = pytest.importorskip("simplejpeg")
pytest.importorskip("cv2")

from array_record.python.array_record_module import ArrayRecordWriter  # noqa: E402
from tensorflow_datasets.proto import tf_example_pb2  # noqa: E402

from orthojax.data import jpeg, streamed_batches  # noqa: E402
from orthojax.data.augmentation import (  # noqa: E402
    EIGENVALUES,
    EIGENVECTORS,
    augment_photographs,
    standardize_rgb,
)
from orthojax.data.records import Records  # noqa: E402
from orthojax.data.streamed import StreamedDataset  # noqa: E402
from orthojax.data.validation import parts, split_off  # noqa: E402
from orthojax.errors import DatasetError  # noqa: E402

COUNT, SIZE, CROP = 23, 40, 32


def serialize(image, label):
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()


def photograph(index):
    """A smooth picture, another one for every index."""
    height, width = 50 + 3 * index, 90 - 2 * index
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(2 * np.pi * (x * (index % 3 + 1) + y * c) + index) for c in (0.5, 1, 1.5)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def encode(image, kind="JPEG", mode="RGB"):
    file = io.BytesIO()
    picture = PIL.Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(
        file, kind, **({"quality": 95} if kind == "JPEG" else {})
    )
    return file.getvalue()


def write(directory, images):
    path = str(directory / "jpeg.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    for index, image in enumerate(images):
        writer.write(serialize(image, index))
    writer.close()
    shards = (f"{path}[0:{len(images)}]",)
    return Records("train", str(directory), shards, len(images), "image", "label", COUNT)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write(tmp_path_factory.mktemp("records"), [encode(photograph(i)) for i in range(COUNT)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (2, 300), (300, 1)])
def test_photographs_of_a_pixel_or_two(shape):
    encoded = encode(np.full((*shape, 3), 7, np.uint8), "PNG")
    for left, top in itertools.product((0, 200), repeat=2):
        out = np.zeros((56, 56, 3), np.uint8)
        jpeg.crop_into(out, encoded, 256, left, top)
        assert (out == 7).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_are_taken(kind):
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    decoded = jpeg.decode(encode(ramp, kind, mode=None))
    assert decoded.shape == (32, 32, 3)
    np.testing.assert_array_equal(decoded, np.repeat((ramp >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_known_range_are_no_image(dtype):
    with pytest.raises(jpeg.UndecodableError, match="no known range"):
        jpeg.decode(encode(np.full((4, 4), 300, dtype), "TIFF", mode=None))


@pytest.mark.parametrize("outside", [COUNT, 100])
def test_labels_outside_the_classes_are_named(tmp_path, outside):
    few = dataclasses.replace(
        write(tmp_path, [encode(photograph(0))] * 3), num_classes=2 if outside == COUNT else 1
    )
    with pytest.raises(DatasetError, match=r"record \d .*has the label \d, and there are \d class"):
        take(dataset(few).train_batches(3, seed=0), 1)


def dataset(records, workers=0):
    options = dict(num_classes=COUNT, resize=SIZE, crop=CROP, flip=True, color_std=0.1)
    return StreamedDataset("photographs", records, records, **options, workers=workers, threads=1)


def take(batches, count):
    found = list(itertools.islice(batches, count))
    if hasattr(batches, "close"):
        batches.close()
    return {name: np.stack([batch[name] for batch in found]) for name in found[0]}


@pytest.fixture(scope="module")
def stream(records):
    """Batches of 6, over more than three epochs, decoded in this process."""
    return take(dataset(records).train_batches(6, seed=3), 13)


def assert_same(actual, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)


def test_every_image_once_an_epoch_in_another_order_each_time(stream):
    labels = stream["label"].ravel()
    epochs = [labels[k * COUNT : (k + 1) * COUNT] for k in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
    assert not (epochs[0] == epochs[1]).all()
    assert stream["image"].shape == (13, 6, CROP, CROP, 3)
    # The crop of an image is another one in another epoch.
    again = [
        stream["image"].reshape(-1, CROP, CROP, 3)[np.flatnonzero(labels == 5)[k]] for k in (0, 1)
    ]
    assert (again[0] != again[1]).any()


def test_the_crops_are_those_of_earlier_versions():
    """With others a resumed run would not be the undisturbed one."""
    geometry = streamed_batches.Geometry(SIZE, CROP)
    found = [
        streamed_batches.train_place(3, COUNT, geometry, position)
        for position in (0, 1, 22, 23, 1000)
    ]
    assert found == [(3, 7, 5), (22, 2, 3), (6, 7, 3), (12, 7, 2), (2, 7, 7)]


def test_workers_change_nothing(records, stream):
    assert_same(take(dataset(records, 3).train_batches(6, seed=3), 13), stream)


def test_hosts_have_their_rows_of_the_same_batches(records, stream):
    for rows in (np.array([0, 1, 2]), np.array([1, 4]), np.array([3])):
        part = take(dataset(records).train_batches(6, seed=3, rows=rows), 13)
        assert_same(part, {name: value[:, rows] for name, value in stream.items()})


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (4, 1), (9, 0)])
def test_goes_on_where_it_stopped_with_other_workers_and_another_batch_size(
    records, stream, stop, workers
):
    first = dataset(records).train_batches(6, seed=3)
    take(first, stop)
    state = first.get_state()
    resumed = dataset(records, workers).train_batches(6, seed=3)
    resumed.set_state(state)
    assert_same(take(resumed, 13 - stop), {name: v[stop:] for name, v in stream.items()})
    other = dataset(records).train_batches(3, seed=3)
    other.set_state(state)
    halves = {name: v[stop:].reshape(-1, 3, *v.shape[2:]) for name, v in stream.items()}
    assert_same(take(other, 2 * (13 - stop)), halves)


def test_training_never_sees_what_is_held_out(records):
    kept, held = split_off(COUNT, 6)
    train, validation = pickle.loads(pickle.dumps(parts(records, 6)))  # as workers get them
    divided = dataclasses.replace(dataset(train), validation=validation)
    labels = take(divided.train_batches(6, seed=3), 6)["label"].ravel()
    assert sorted(labels[:17]) == sorted(labels[17:34]) == kept.tolist()
    for rows in ([0, 2], [1, 3]):
        batches = list(divided.validation_batches(4, np.array(rows)))
        seen = np.concatenate([batch["label"][batch["mask"] > 0] for batch in batches])
        assert seen.tolist() == [h for k, h in enumerate(held.tolist()) if k % 4 in rows]


def test_closing_does_not_wait_for_what_the_workers_have_sent(records):
    """Of crops so large that a pipe holds less than a chunk of them."""
    large = dataclasses.replace(dataset(records, workers=2), resize=256, crop=224)
    batches = large.train_batches(6, seed=0)
    next(batches)
    time.sleep(0.5)  # until the workers wait for room in their pipes
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("batch_size", [4, 23, 50])
def test_evaluation_sees_every_image_exactly_once(records, batch_size):
    for rows in (None, np.arange(1, batch_size, 2)):
        batches = list(dataset(records).test_batches(batch_size, rows))
        mask = np.concatenate([batch["mask"] for batch in batches]).astype(bool)
        labels = np.concatenate([batch["label"] for batch in batches])[mask]
        wanted = np.arange(COUNT)
        if rows is not None:
            wanted = wanted[wanted % batch_size % 2 == 1]
        np.testing.assert_array_equal(labels, wanted)
    images = np.concatenate([b["image"] for b in dataset(records).test_batches(COUNT)])
    margin = (SIZE - CROP) // 2
    for index in (0, 11, 22):
        square = jpeg.resize(jpeg.decode(encode(photograph(index)), SIZE), SIZE)
        expected = square[margin:-margin, margin:-margin].astype(int)
        # Only the window is resized, whose edges are whole pixels of the photograph.
        assert np.corrcoef(images[index].ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.filterwarnings("ignore:in (epoch|this pass):UserWarning")
def test_odd_images_are_read_and_broken_ones_replaced_and_counted(tmp_path):
    good = encode(photograph(3))
    odd = [
        encode(photograph(0), mode="L"), encode(photograph(1), mode="CMYK"),
        encode(photograph(2), "PNG"), good[: len(good) // 2], b"not an image", good,
    ]  # fmt: skip
    records = write(tmp_path, odd)
    with pytest.warns(
        UserWarning, match=r"image number [34] of split 'train'.*replaced by the next"
    ):
        batch = take(dataset(records).train_batches(6, seed=0), 2)
    assert sorted(batch["label"][0].tolist()) == [0, 1, 2, 5, 5, 5]
    with pytest.warns(UserWarning, match="left out"):
        [batch] = dataset(records).test_batches(6)
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 0, 0, 1])


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")])
def test_other_kinds_of_images_decode_to_what_pillow_makes_of_them(kind, mode):
    encoded = encode(photograph(4), kind, mode)
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        expected = np.array(image.convert("RGB"))
    found = jpeg.decode(encoded)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_reduced_decoding_is_near_full_decoding():
    y, x = np.mgrid[0:1:700j, 0:1:900j]
    waves = [np.sin(40 * x * (c + 1)) * np.cos(30 * y) for c in range(3)]
    encoded = encode((127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))
    reduced = jpeg.decode(encoded, at_least=64)
    assert reduced.shape[0] < 700 and min(reduced.shape[:2]) >= 128
    full, quick = (jpeg.resize(i, 64) for i in (jpeg.decode(encoded), reduced))
    assert np.abs(full.astype(float) - quick).mean() < 1.0


def test_resizing_is_near_pillows_antialiased_bilinear():
    image = photograph(20)
    expected = PIL.Image.fromarray(image).resize((SIZE, SIZE), PIL.Image.BILINEAR)
    assert np.abs(jpeg.resize(image, SIZE).astype(float) - np.array(expected)).mean() < 2.0


def test_colors_on_the_device_equal_float64():
    """Mirroring and the three color components, drawn apart, then put together in NumPy."""
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), np.uint8)
    flip_key, color_key = jax.random.split(jax.random.key(4))
    mirrored = np.asarray(jax.random.bernoulli(flip_key, 0.5, (7, 1, 1, 1))).ravel()
    draws = 0.1 * np.asarray(jax.random.normal(color_key, (7, 3)), np.float64)
    pixels = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images).astype(np.float64)
    shift = np.stack([np.float64(EIGENVECTORS) @ (d * np.float64(EIGENVALUES)) for d in draws])
    expected = (pixels + 255 * shift[:, None, None] - np.array([123.68, 116.779, 103.939])) * 0.017
    augment = jax.jit(augment_photographs, static_argnames=("flip", "color_std"))
    found = augment(images, jax.random.key(4), flip=True, color_std=0.1)
    np.testing.assert_allclose(found, expected, atol=2e-2)
    plain = augment(images, jax.random.key(4), flip=False, color_std=0.0)
    np.testing.assert_array_equal(plain, jax.jit(standardize_rgb)(images))


@pytest.mark.parametrize("record", [b"\xff\xff\xff", b"", None], ids=["other", "empty", "missing"])
def test_a_record_that_is_no_example_is_named(tmp_path, record):
    path = tmp_path / "some.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(record or b"")
    writer.close()
    if record is None:
        path.unlink()
    records = Records("train", str(tmp_path), (f"{path}[0:1]",), 1, "image", "label", 2)
    with pytest.raises(DatasetError, match=f"record 0 of split 'train' in {tmp_path} is damaged"):
        records[0]
