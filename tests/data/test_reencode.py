"""Photographs written again as squares: on a small set made here, without TensorFlow."""

import io
import shutil

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

simplejpeg = pytest.importorskip("simplejpeg")
pytest.importorskip("cv2")

from orthojax.data import fake_data, jpeg, load, prepare, prepared, reencode  # noqa: E402
from orthojax.errors import DatasetError, MissingExtraError, UserError  # noqa: E402
from tests.data.prepare_data import prepare_data  # noqa: E402

NAME, CONFIG, SIZE = "orthojax_photographs", "summer", 24
SQUARES = f"{NAME}_{SIZE}/{CONFIG}"
COUNTS = {"train": 23, "validation": 9}


def photograph(index):
    """A smooth picture, another one for every index."""
    height, width = 50 + 3 * index, 90 - 2 * index
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(2 * np.pi * (x * (index % 3 + 1) + y * c) + index) for c in (0.5, 1, 1.5)]
    return PIL.Image.fromarray((127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))


def encode(index):
    mode = {3: "L", 5: "CMYK"}.get(index, "RGB")
    file = io.BytesIO()
    photograph(index).convert(mode).save(file, "PNG" if index == 7 else "JPEG", quality=97)
    return file.getvalue()


class OrthojaxPhotographs(tfds.core.GeneratorBasedBuilder):
    """Of many sizes and several kinds, in three shards a split; some may be cut short."""

    VERSION = tfds.core.Version("2.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=CONFIG)]
    url_infos = {}
    damaged: dict[str, set[int]] = {}

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=[f"class {k}" for k in range(30)]),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
        for index in range(COUNTS[split]):
            image = encode(index)
            if index in self.damaged.get(split, ()):
                image = image[: len(image) // 2]
            yield index, {"image": image, "label": index, "file_name": f"{split} {index}.jpg"}


class OrthojaxSquares(OrthojaxPhotographs):
    """Of one size."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


def write_original(data_dir):
    """TFDS's own preparation, in three shards a split."""
    OrthojaxPhotographs(data_dir=data_dir, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3),
        download_dir=data_dir / "downloads",
    )
    shutil.rmtree(data_dir / "downloads", ignore_errors=True)
    return data_dir


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("original"))


@pytest.fixture
def data_dir(original, tmp_path):
    shutil.copytree(original, tmp_path / "tfds")
    return tmp_path / "tfds"


@pytest.fixture(scope="module")
def squares(original, tmp_path_factory):
    """The data directory after re-encoding in this process."""
    place = tmp_path_factory.mktemp("squares")
    shutil.copytree(original, place, dirs_exist_ok=True)
    directory = reencode.reencode(NAME, SIZE, str(place), workers=1)
    assert directory == str(place / f"{NAME}_{SIZE}" / CONFIG / "2.1.0")
    return place


def examples(name, data_dir, split):
    found = prepared.find(name, str(data_dir))
    records = prepared.records(found, split)
    return [records[index] for index in range(len(records))]


def names(name, data_dir, split):
    builder = prepared.named_builder(name, str(data_dir))
    decoders = {"image": tfds.decode.SkipDecoding()}
    return [e["file_name"] for e in builder.as_data_source(split, decoders=decoders)]


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("split", COUNTS)
def test_images_are_the_photographs_as_training_resizes_them(squares, split):
    old, new = examples(NAME, squares, split), examples(SQUARES, squares, split)
    assert [label for _, label in new] == [label for _, label in old]
    assert sorted(label for _, label in new) == list(range(COUNTS[split]))
    assert names(SQUARES, squares, split) == names(NAME, squares, split)
    for (encoded, _), (photo, _) in zip(new, old, strict=True):
        assert simplejpeg.decode_jpeg_header(encoded)[:4] == (SIZE, SIZE, "YCbCr", "444")
        expected = jpeg.resize(jpeg.decode(photo, at_least=SIZE), SIZE)
        found = simplejpeg.decode_jpeg(encoded)
        error = np.mean(np.square(found.astype(float) - expected))
        assert 10 * np.log10(255**2 / error) > 36, "a PSNR in dB"


def test_quality_is_that_of_the_jpegs(squares, data_dir):
    reencode.reencode(NAME, SIZE, str(data_dir), quality=50, workers=1)
    sizes = [
        sum(len(encoded) for encoded, _ in examples(SQUARES, place, "train"))
        for place in (data_dir, squares)
    ]
    assert sizes[0] < 0.9 * sizes[1]


def test_metadata_are_the_originals(squares):
    old, new = (prepared.named_builder(name, str(squares)).info for name in (NAME, SQUARES))
    assert new.full_name == f"{NAME}_{SIZE}/{CONFIG}/2.1.0"
    assert {name: split.num_examples for name, split in new.splits.items()} == COUNTS
    assert repr(new.features) == repr(old.features)
    assert new.features["label"].names == old.features["label"].names


def test_workers_change_nothing(squares, data_dir):
    """From the command line, where nothing knows the original's code."""
    options = (f"--resize={SIZE}", "--workers=2", f"--data_dir={data_dir}")
    done = prepare_data(NAME, *options, timeout=120)
    assert done.stdout.endswith(f"\n{NAME} is prepared in {data_dir / SQUARES / '2.1.0'}\n")
    for split in COUNTS:
        assert examples(SQUARES, data_dir, split) == examples(SQUARES, squares, split)
        assert names(SQUARES, data_dir, split) == names(SQUARES, squares, split)


def test_what_is_prepared_is_left_as_it_is(squares, tmp_path, monkeypatch):
    shutil.copytree(squares / f"{NAME}_{SIZE}", tmp_path / f"{NAME}_{SIZE}")
    monkeypatch.setattr(prepare, "prepare", None)  # the original is not even needed
    before = files(tmp_path)
    assert reencode.reencode(NAME, SIZE, str(tmp_path)) == str(tmp_path / SQUARES / "2.1.0")
    with pytest.raises(DatasetError, match="with quality=95, not 90; remove that directory"):
        reencode.reencode(NAME, SIZE, str(tmp_path), quality=90)
    assert files(tmp_path) == before


def test_loads_as_any_other_set(squares):
    options = dict(resize=SIZE, crop=16, workers=0)
    data = load(SQUARES, str(squares), **options)
    assert (data.train_size, data.test_size, data.num_classes) == (23, 9, 30)
    batch = next(data.train_batches(23, seed=0))
    assert sorted(batch["label"].tolist()) == list(range(23))
    [batch] = data.test_batches(9)
    for image, (encoded, label) in zip(
        batch["image"], examples(SQUARES, squares, "validation"), strict=True
    ):
        np.testing.assert_array_equal(image, simplejpeg.decode_jpeg(encoded)[4:20, 4:20])
        assert label in batch["label"]
    # TFDS knows which config is meant where none is named.
    assert load(f"{NAME}_{SIZE}", str(squares), **options).train_size == 23


def test_shapes_are_known_without_records(squares, tmp_path):
    for place in (squares, tmp_path):
        black = fake_data(SQUARES, str(place), resize=SIZE, crop=16)
        assert (black.image_shape, black.num_classes) == ((16, 16, 3), 30)
    assert fake_data("imagenet2012_256", str(tmp_path)).num_classes == 1000


def test_what_is_interrupted_leaves_nothing_prepared(data_dir, monkeypatch):
    before = files(data_dir / NAME)
    resize, calls = jpeg.resize, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return resize(*arguments)

    monkeypatch.setattr(jpeg, "resize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reencode.reencode(NAME, SIZE, str(data_dir), workers=1)
    assert files(data_dir / NAME) == before
    with pytest.raises(DatasetError, match=f"orthojax prepare {NAME}/{CONFIG} .*--resize={SIZE}"):
        load(SQUARES, str(data_dir))
    reencode.reencode(NAME, SIZE, str(data_dir), workers=1)
    assert len(examples(SQUARES, data_dir, "train")) == 23


def test_undecodable_images_are_left_out_and_counted(tmp_path, monkeypatch):
    damaged = {"train": {2, 13, 17}}
    monkeypatch.setattr(OrthojaxPhotographs, "damaged", damaged)
    data_dir = write_original(tmp_path)
    order = [label for _, label in examples(NAME, data_dir, "train")]
    first = next(row for row, label in enumerate(order) if label in damaged["train"])
    with pytest.warns(UserWarning, match="decoded") as warned:
        reencode.reencode(NAME, SIZE, str(data_dir), workers=1)
    told = [str(warning.message) for warning in warned if "decoded" in str(warning.message)]
    assert f"image number {first} of split 'train'" in told[0] and len(told) == 2
    assert told[1].startswith("in all 3 images of split 'train'")
    kept = [label for _, label in examples(SQUARES, data_dir, "train")]
    assert kept == [label for label in order if label not in damaged["train"]]
    assert len(examples(SQUARES, data_dir, "validation")) == 9


@pytest.mark.filterwarnings("ignore:.*decoded:UserWarning")
def test_a_split_without_a_decodable_image_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(OrthojaxPhotographs, "damaged", {"validation": set(range(9))})
    data_dir = write_original(tmp_path)
    with pytest.raises(DatasetError, match="not one image of split 'validation'"):
        reencode.reencode(NAME, SIZE, str(data_dir), workers=1)


@pytest.mark.parametrize("damage", ["bytes changed", "missing", "of another kind"])
def test_damaged_records_are_told(data_dir, damage):
    path = sorted((data_dir / NAME / CONFIG / "2.1.0").glob("*-train*"))[1]
    if damage == "bytes changed":
        path.write_bytes(path.read_bytes()[:200] + bytes(3800) + path.read_bytes()[4000:])
    else:
        path.unlink()
    if damage == "of another kind":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(8):
            writer.write(b"no tf.train.Example")
        writer.close()
    with pytest.raises(DatasetError, match="records in .*2.1.0 are damaged"):
        reencode.reencode(NAME, SIZE, str(data_dir), workers=1)
    assert not list(data_dir.rglob("*.array_record*incomplete*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="imagenet2013"), "unknown data set 'imagenet2013'; did you mean imagenet2012"),
        (dict(name="orthojax_squares"), "'orthojax_squares' are all of 8x8 pixels; choose"),
        (dict(name=f"{NAME}_12"), f"orthojax prepare {NAME} .*--resize=12"),
        (dict(name="no_such_set_256"), "unknown data set 'no_such_set_256'"),
        (dict(name="orthojax_squares_256"), "unknown data set 'orthojax_squares_256'"),
        (dict(size=0), "size=0 must be an integer of at least 1"),
        (dict(quality=0), "quality=0 must be an integer of at least 1 and at most 100"),
        (dict(quality=101), "quality=101"),
        (dict(workers=0), "workers=0 must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_used_is_named(data_dir, arguments, message):
    before = files(data_dir)
    call = {"name": NAME, "size": SIZE, "data_dir": str(data_dir), "workers": 1, **arguments}
    with pytest.raises(UserError, match=message):
        reencode.reencode(**call)
    assert files(data_dir) == before


def test_missing_packages_and_places_that_cannot_be_written_are_named(data_dir, monkeypatch):
    (data_dir / f"{NAME}_{SIZE}").write_text("a file instead of a directory")
    with pytest.raises(DatasetError, match=f"cannot write .*{NAME}_{SIZE}.*make room"):
        reencode.reencode(NAME, SIZE, str(data_dir), workers=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs grain, .*: pip install .*\[imagenet\]"):
        reencode.reencode(NAME, SIZE, str(data_dir))
