"""Batches and augmentation: an exact, resumable stream; an exact evaluation; fair mirrors."""

import functools
import json

import jax
import numpy as np
import pytest

from orthojax.data import (
    Split,
    TrainIterator,
    augment,
    eval_batches,
    fake_data,
    implementation,
    in_memory,
    load,
    normalize,
)
from orthojax.data.augmentation import augment_photographs
from orthojax.data.preprocessing import Preprocessing
from orthojax.data.sampler import epoch_permutation
from orthojax.data.validation import held_out, split_off
from orthojax.errors import ConfigError, DatasetError


def numbered(size):
    """A split whose images and labels both say which row they are."""
    rows = np.arange(size)
    images = np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (size, 2, 3, 1))
    return Split(images=np.ascontiguousarray(images), labels=rows.astype(np.int32))


def assert_same_batch(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def test_permutation_is_a_function_of_seed_and_epoch():
    orders = {
        (seed, epoch): tuple(epoch_permutation(seed, epoch, 50))
        for seed in (0, 1, 2**40)
        for epoch in (0, 1, 2)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == len(orders)
    assert tuple(epoch_permutation(1, 2, 50)) == orders[1, 2]


def test_permutation_does_not_change_with_platform_or_version():
    assert epoch_permutation(0, 0, 10).tolist() == [1, 4, 5, 6, 8, 2, 0, 3, 9, 7]
    assert epoch_permutation(7, 3, 10).tolist() == [4, 5, 1, 0, 8, 3, 6, 9, 2, 7]


def test_permutation_is_uniform():
    first = np.array([epoch_permutation(0, epoch, 4) for epoch in range(4000)])
    counts = np.array([[np.sum(first[:, place] == row) for row in range(4)] for place in range(4)])
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize("size, batch_size", [(10, 3), (10, 10), (10, 5), (7, 6), (5, 1)])
def test_the_stream_is_the_epochs_one_after_another(size, batch_size):
    batches = TrainIterator(numbered(size), batch_size, seed=3)
    found = [next(batches) for _ in range(4 * size)]
    for batch in found:
        assert batch["image"].shape == (batch_size, 2, 3, 1) and batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(batch["image"][:, 1, 2, 0], batch["label"])
    stream = np.concatenate([batch["label"] for batch in found])
    assert stream.dtype == np.int32
    expected = np.concatenate([epoch_permutation(3, e, size) for e in range(4 * batch_size)])
    np.testing.assert_array_equal(stream, expected)


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 8])
def test_resuming_is_exact(stop):
    undisturbed = TrainIterator(numbered(10), 4, seed=5)
    batches = [next(undisturbed) for _ in range(12)]

    killed = TrainIterator(numbered(10), 4, seed=5)
    for _ in range(stop):
        next(killed)
    state = json.loads(json.dumps(killed.get_state()))
    assert state["position"] == 4 * stop

    resumed = TrainIterator(numbered(10), 4, seed=5)
    next(resumed)  # wherever it stood
    resumed.set_state(state)
    for expected in batches[stop:]:
        assert_same_batch(next(resumed), expected)


def test_another_batch_size_goes_on_in_the_same_stream():
    whole = next(TrainIterator(numbered(10), 10, seed=1))["label"]
    small = TrainIterator(numbered(10), 4, seed=1)
    next(small)
    large = TrainIterator(numbered(10), 6, seed=1)
    large.set_state(small.get_state())
    np.testing.assert_array_equal(next(large)["label"], whole[4:])


@pytest.mark.parametrize("size, seed, says", [(10, 1, "seed 0.* seed 1"), (9, 0, "10.* 9")])
def test_the_state_of_another_stream_is_refused(size, seed, says):
    state = TrainIterator(numbered(10), 4, seed=0).get_state()
    other = TrainIterator(numbered(size), 4, seed=seed)
    with pytest.raises(DatasetError, match=says):
        other.set_state(state)
    assert other.get_state()["position"] == 0


@pytest.mark.parametrize(("size", "number"), [(1437, 144), (10, 9), (23, 1), (5000, 1234)])
def test_what_is_held_out_and_what_is_left_are_the_split(size, number):
    kept, held = split_off(size, number)
    assert len(held) == number and (np.diff(held) > 0).all() and (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(size))


@pytest.mark.parametrize("order", ["sorted", "in turns"])
def test_every_class_is_held_out(order):
    labels = np.arange(1000) // 100 if order == "sorted" else np.arange(1000) % 10
    _, held = split_off(1000, 100)
    counts = np.bincount(labels[held], minlength=10)
    assert counts.min() >= 3 and (order == "in turns" or (counts == 10).all())


def test_a_number_of_images_may_have_become_a_float():
    assert held_out(500.0, 1437) == held_out(np.int64(500), 1437) == 500 and held_out(1, 2) == 1


def test_what_is_held_out_is_that_of_earlier_versions():
    """With another rule a resumed run would train on what it was chosen by."""
    assert split_off(23, 6)[1].tolist() == [1, 3, 10, 14, 18, 21]


def test_batches_own_their_memory():
    split = numbered(10)
    batches = TrainIterator(split, 10, seed=0)
    first = next(batches)
    kept = {name: array.copy() for name, array in first.items()}
    second = next(batches)
    assert_same_batch(first, kept)
    second["image"][:] = 99
    second["label"][:] = 99
    assert_same_batch({"label": split.labels}, {"label": numbered(10).labels})
    np.testing.assert_array_equal(split.images, numbered(10).images)


def test_impossible_batch_sizes():
    with pytest.raises(DatasetError, match="batch_size 11 .* 10 images"):
        TrainIterator(numbered(10), 11, seed=0)
    with pytest.raises(ConfigError, match="batch_size=0 must be an integer of at least 1"):
        TrainIterator(numbered(10), 0, seed=0)
    with pytest.raises(ConfigError, match="batch_size=-1 must be"):
        eval_batches(numbered(10), -1)
    with pytest.raises(ConfigError, match="seed=-1 must be an integer of at least 0"):
        TrainIterator(numbered(10), 4, seed=-1)


NO_INTEGER = (None, "3", 1.5, np.nan, True, -2, np.array([1]))
NO_SHARE = (None, "3", 1.5, 1.0, np.nan, np.inf, True, -2, -0.1, 1e-9, np.array([1]))
NO_FLAG = (None, 2, "no", np.ones(2))
PIXELS = np.zeros((3, 4, 4, 3), np.uint8)
NO_PIXELS = (None, "x", 3, PIXELS / 255, PIXELS[0], PIXELS.astype(np.int32))
NO_DEVIATION = ("x", np.nan, 0.0, -1.0, np.ones(2), np.ones((7, 1, 1, 1)))
KEY = jax.random.key(0)


PLAIN = {"mean": 0.0, "std": 1.0}


WRONG = [
    ("batch_size", lambda v: TrainIterator(numbered(10), v, 0), (*NO_INTEGER, 0)),
    ("batch_size", lambda v: eval_batches(numbered(10), v), (*NO_INTEGER, 0, 10**15)),
    ("seed", lambda v: TrainIterator(numbered(10), 2, v), NO_INTEGER),
    ("rows", lambda v: TrainIterator(numbered(10), 2, 0, v), ([2], [-1], [1, 0], [0.5], 1, [[0]])),
    ("rows", lambda v: eval_batches(numbered(10), 2, v), ([2], [-1], [0, 0])),
    ("split", lambda v: TrainIterator(v, 2, 0), (None, PIXELS)),
    ("state", lambda v: TrainIterator(numbered(10), 2, 0).set_state(v), (None, {}, 3)),
    ("images", lambda v: Split(v, np.zeros(3, np.int32)), NO_PIXELS),
    ("labels", lambda v: Split(PIXELS, v), (None, np.zeros(3), np.zeros(2, np.int32))),
    ("images", lambda v: normalize(v, **PLAIN), NO_PIXELS),
    ("std", lambda v: normalize(PIXELS, **{**PLAIN, "std": v}), NO_DEVIATION),
    ("mean", lambda v: normalize(PIXELS, **{**PLAIN, "mean": v}), ("x", np.inf, np.ones(2))),
    ("images", lambda v: augment(v, KEY, **PLAIN, flip=False), NO_PIXELS),
    ("flip", lambda v: augment(PIXELS, KEY, **PLAIN, flip=v), NO_FLAG),
    ("key", lambda v: augment(PIXELS, v, **PLAIN, flip=True), (None, 0, "key")),
    (
        "color_std",
        lambda v: augment_photographs(PIXELS, KEY, flip=True, color_std=v),
        (None, "x", np.nan, -0.1),
    ),
    (
        "images",
        lambda v: augment_photographs(v, KEY, flip=True, color_std=0.0),
        (*NO_PIXELS, PIXELS[..., :1]),
    ),
    ("images", lambda v: in_memory.average_pool(v, 2), NO_PIXELS),
    ("size", lambda v: in_memory.average_pool(PIXELS, v), (*NO_INTEGER, 0, 3)),
    ("images", lambda v: in_memory.pixel_statistics(v), (*NO_PIXELS, PIXELS[:0])),
    ("downsample", lambda v: load("digits", downsample=v), NO_INTEGER),
    ("flip", lambda v: load("digits", flip=v), NO_FLAG),
    ("train_split", lambda v: load("digits", train_split=v), (None, 3, "")),
    ("cache_dir", lambda v: load("digits", cache_dir=v), (3, b"here")),
    ("data_dir", lambda v: load("digits", v), (3, b"here", ["here"])),
    ("data_dir", lambda v: load("folder", v), (3, b"here")),
    ("name", lambda v: load(v), (None, 3, b"digits")),
    ("section", lambda v: implementation(v), (None, 3, "digits")),
    ("resize", lambda v: fake_data("imagenet2012", resize=v), (*NO_INTEGER, 0, 10**9)),
    ("crop", lambda v: fake_data("imagenet2012", crop=v), (*NO_INTEGER, 0, 257)),
    ("workers", lambda v: fake_data("imagenet2012", workers=v), NO_INTEGER[1:]),
    ("validation", lambda v: fake_data("imagenet2012", validation=v), (*NO_SHARE, 2**20)),
    ("validation", lambda v: fake_data("digits", validation=v), NO_SHARE),
    ("threads", lambda v: fake_data("imagenet2012", threads=v), (*NO_INTEGER, 0)),
    ("color_std", lambda v: fake_data("imagenet2012", color_std=v), (None, "x", np.nan, -1)),
    ("image_shape", lambda v: Preprocessing(v, ("a",)), (None, 3, (4, 4), (4, 0, 3), "abc")),
    ("class_names", lambda v: Preprocessing((4, 4, 3), v), ("ab", (), (1, 2), ("a", "a"))),
    ("resize", lambda v: Preprocessing((4, 4, 3), ("a",), resize=v), (*NO_INTEGER, 3)),
    ("mean", lambda v: Preprocessing((4, 4, 3), ("a",), v), (np.zeros(3),)),
    ("std", lambda v: Preprocessing((4, 4, 3), ("a",), np.zeros(3), v), NO_DEVIATION),
    ("path", lambda v: Preprocessing((4, 4, 3), ("a",)).read(v), (None, 3, b"x.png")),
    ("images", lambda v: Preprocessing((4, 4, 3), ("a",)).normalize(v), NO_PIXELS),
]


@pytest.mark.parametrize(("name", "call", "values"), WRONG)
def test_wrong_arguments_are_refused_by_name(name, call, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{name}(=| of shape ).* must be "):
            call(value)


def test_numbers_of_numpy_are_numbers():
    batches = TrainIterator(numbered(10), np.int64(4), np.uint8(0), np.arange(2))
    assert next(batches)["label"].shape == (2,)
    assert normalize(PIXELS, mean=np.float64(0), std=np.float32(1)).shape == PIXELS.shape


@pytest.mark.parametrize("size, batch_size", [(10, 4), (10, 5), (10, 10), (10, 16), (10, 1)])
def test_evaluation_sees_every_image_once(size, batch_size):
    split = numbered(size)
    batches = list(eval_batches(split, batch_size))
    assert len(batches) == -(-size // batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 2, 3, 1) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (batch_size,) and batch["label"].dtype == np.int32
        assert batch["mask"].shape == (batch_size,) and batch["mask"].dtype == np.float32
    together = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert set(together["mask"]) <= {0, 1}
    real = together["mask"] == 1
    np.testing.assert_array_equal(together["label"][real], split.labels)
    np.testing.assert_array_equal(together["image"][real], split.images)
    assert not together["image"][~real].any() and not together["label"][~real].any()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (256, 4, 6, 3), np.uint8)


@pytest.fixture
def statistics():
    generator = np.random.default_rng(1)
    shape = (4, 6, 3)
    return {
        "mean": generator.uniform(0.3, 0.6, shape).astype(np.float32),
        "std": generator.uniform(0.1, 0.3, shape).astype(np.float32),
    }


def test_normalize(images, statistics):
    result = jax.jit(normalize)(images, **statistics)
    assert result.dtype == np.float32
    expected = (images.astype(np.float64) / 255 - statistics["mean"]) / statistics["std"]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_each_image_is_mirrored_or_not(images):
    plain = functools.partial(augment, mean=0.0, std=1 / 255, flip=True)
    result = np.rint(jax.jit(plain)(images, jax.random.key(0)))
    kept = (result == images).all(axis=(1, 2, 3))
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(images))
    again = np.rint(jax.jit(plain)(images, jax.random.key(1)))
    other = (again == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 0.3 < (mirrored == other).mean() < 0.7


def test_mirroring_comes_before_the_per_pixel_normalization(images, statistics):
    key = jax.random.key(0)
    result = augment(images, key, **statistics, flip=True)
    flipped = np.rint(np.asarray(augment(images, key, mean=0.0, std=1 / 255, flip=True)))
    expected = normalize(flipped.astype(np.uint8), **statistics)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_without_flip_only_the_normalization_is_left(images, statistics):
    result = augment(images, jax.random.key(0), **statistics, flip=False)
    np.testing.assert_array_equal(result, normalize(images, **statistics))


def test_augment_compiles_once_and_is_the_same_on_eight_devices(images, statistics):
    compiled = jax.jit(augment, static_argnames="flip")
    result = [compiled(images, jax.random.key(step), **statistics, flip=True) for step in range(3)]
    assert compiled._cache_size() == 1
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = compiled(jax.device_put(images, sharding), jax.random.key(2), **statistics, flip=True)
    np.testing.assert_allclose(spread, result[2], rtol=1e-6, atol=1e-6)
