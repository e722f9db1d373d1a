"""The cache of decoded splits: it is used, it is never stale, and damage to it is mended."""

import shutil

import numpy as np
import pytest

from orthojax.data import bundled, cache, load
from orthojax.data import prepared as prepared_sets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data directory with digits in it, copied for every test that changes it."""
    directory = tmp_path_factory.mktemp("tfds")
    load("digits", str(directory), cache_dir=str(tmp_path_factory.mktemp("cache")))
    return directory


@pytest.fixture
def data_dir(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "tfds")


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The splits that were decoded, in order, as the test goes on."""
    splits = []
    decode = prepared_sets.decode

    def counted(found, split):
        splits.append(split)
        return decode(found, split)

    monkeypatch.setattr(prepared_sets, "decode", counted)
    return splits


TRAIN, TEST = "train[:100]", "test[:20]"  # enough to tell, quick to decode


def load_digits(data_dir, cache_dir, *, train_split=TRAIN, **options):
    return load(
        "digits",
        str(data_dir),
        train_split=train_split,
        test_split=TEST,
        cache_dir=str(cache_dir),
        **options,
    )


def cached_training_file(cache_dir):
    (path,) = cache_dir.rglob("train*.npz")
    return path


def test_a_split_is_decoded_once(data_dir, cache_dir, decoded):
    first = load_digits(data_dir, cache_dir)
    second = load_digits(data_dir, cache_dir)
    assert decoded == [TRAIN, TEST]
    for name in ("mean", "std"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)
    assert second.train.images.dtype == np.uint8 and second.train.labels.dtype == np.int32


def test_downsampling_shares_the_decoded_images(data_dir, cache_dir, decoded):
    for size in (8, 4, 2, 8, 4):
        assert load_digits(data_dir, cache_dir, downsample=8 // size).mean.shape == (size, size, 1)
    assert decoded == [TRAIN, TEST]


def test_slices_are_cached_apart(data_dir, cache_dir, decoded):
    for _ in range(2):
        half = load_digits(data_dir, cache_dir, train_split="train[:50]")
        whole = load_digits(data_dir, cache_dir)
        assert len(half.train) < len(whole.train)
    assert decoded == ["train[:50]", TEST, TRAIN]


def test_two_directories_do_not_displace_each_other(data_dir, cache_dir, decoded, tmp_path):
    other = shutil.copytree(data_dir, tmp_path / "other")
    for directory in (data_dir, other, data_dir, other):
        load_digits(directory, cache_dir)
    assert decoded == [TRAIN, TEST] * 2


def test_a_set_prepared_anew_is_decoded_anew(data_dir, cache_dir, monkeypatch):
    before = load_digits(data_dir, cache_dir)
    shutil.rmtree(data_dir / "digits")
    rows = bundled.test_rows
    monkeypatch.setattr(bundled, "test_rows", lambda labels: rows(labels) + 1)
    after = load_digits(data_dir, cache_dir)
    assert after.train.images.shape == before.train.images.shape
    assert (after.train.images != before.train.images).any()
    # The old file is overwritten, not left beside the new one.
    assert len(list(cache_dir.rglob("*.npz"))) == 2


@pytest.mark.parametrize("size_is_kept", [True, False])
def test_the_fingerprint_sees_every_file(data_dir, size_is_kept):
    directory = data_dir / "digits" / "1.0.0"
    before = cache.fingerprint(str(directory))
    assert cache.fingerprint(str(directory)) == before
    shard = directory / "digits-test.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes() + (b"" if size_is_kept else b"more"))
    assert cache.fingerprint(str(directory)) != before


def damage_by_truncation(path):
    path.write_bytes(path.read_bytes()[:-1000])


def damage_by_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_by_emptying(path):
    path.write_bytes(b"")


def damage_by_another_file(path):
    np.savez(path.open("wb"), something=np.zeros(3))


def replace_in(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def damage_to_a_shape(path):
    replace_in(path, b"'shape': (100, 8, 8, 1)", b"'shape': (100, 0, 8, 1)")


def damage_to_a_name(path):
    replace_in(path, b"labels.npy", b"lab%ls.npy")


def damage_to_the_kind_of_compression(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 10] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        *(damage_by_truncation, damage_by_one_bit, damage_by_emptying, damage_by_another_file),
        *(damage_to_a_shape, damage_to_a_name, damage_to_the_kind_of_compression),
    ],
)
def test_a_damaged_file_is_made_anew(data_dir, cache_dir, decoded, capsys, damage):
    whole = load_digits(data_dir, cache_dir)
    damage(cached_training_file(cache_dir))
    mended = load_digits(data_dir, cache_dir)
    assert ".npz is damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(mended.train.images, whole.train.images)
    load_digits(data_dir, cache_dir)
    assert decoded == [TRAIN, TEST, TRAIN]
    assert capsys.readouterr().err == ""


def test_an_interrupted_write_leaves_nothing(data_dir, cache_dir, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_digits(data_dir, cache_dir)
    assert not [path for path in cache_dir.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_is_done_without(data_dir, cache_dir, capsys):
    cache_dir.write_text("a file in the way")
    assert len(load_digits(data_dir, cache_dir).train) == 100
    assert "cannot cache decoded images" in capsys.readouterr().err


def test_the_default_place(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load("digits", str(data_dir), train_split=TRAIN, test_split=TEST)
    assert (tmp_path / "xdg" / "orthojax" / "datasets" / "digits" / "1.0.0").is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_directory() == tmp_path / "home" / ".cache" / "orthojax" / "datasets"


def test_progress_is_told_on_stderr(data_dir, cache_dir, monkeypatch, capsys):
    load_digits(data_dir, cache_dir)
    assert capsys.readouterr().err == ""  # over in no time
    monkeypatch.setattr(prepared_sets, "_PROGRESS_SECONDS", 0)
    load_digits(data_dir, cache_dir, train_split="train")
    told = capsys.readouterr().err
    assert "decoding digits/1.0.0 train:" in told and "1437/1437" in told
