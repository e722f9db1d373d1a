"""A trained run, loaded: the very net that training evaluated, without data set and optimizer."""

import dataclasses
import io
import json
import shutil
import struct

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest

import orthojax
from orthojax import data
from orthojax.data.preprocessing import Preprocessing
from orthojax.errors import DatasetError, MissingExtraError, WorkdirError
from orthojax.inference.evaluation import evaluate
from orthojax.sites import is_site
from orthojax.storage.workdir import seal
from orthojax.training.train import train_and_evaluate
from tests.training.tiny import tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_config(eval_every=4, checkpoint_every=4)
    config.dataset.data_dir = str(tmp_path_factory.mktemp("tfds"))
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train_and_evaluate(config, workdir)


@pytest.fixture(scope="module")
def digits(config):
    return data.load("digits", config.dataset.data_dir)


@pytest.fixture(scope="module")
def classifier(trained):
    return orthojax.load_classifier(trained[0], step="latest")


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def test_it_is_the_net_that_was_evaluated(trained, classifier, digits):
    found = evaluate(classifier, digits.test_batches(128))
    _, summary = trained
    assert found.accuracy == summary["test_accuracy"]
    assert found.top5_accuracy == summary["test_top5_accuracy"]
    np.testing.assert_allclose(found.loss, summary["test_loss"], rtol=1e-5)
    counts = np.bincount(digits.test.labels, minlength=10)
    np.testing.assert_array_equal(found.confusion.sum(axis=1), counts)
    weighted = np.average(found.class_accuracies, weights=counts)
    np.testing.assert_allclose(weighted, found.accuracy)


def test_it_has_no_sites_and_no_optimizer(classifier):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(classifier.variables)]
    assert not any(is_site(path) for path in paths)
    assert set(classifier.variables) == {"params", "batch_stats"}


def test_plain_orbax_reads_the_same_parameters(trained, classifier):
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore((trained[0] / "checkpoints" / "12" / "state").absolute())
    kernels = jax.tree.leaves(
        jax.tree.map(
            lambda ours, theirs: np.array_equal(ours, theirs),
            classifier.variables["batch_stats"],
            state["batch_stats"],
        )
    )
    assert kernels and all(kernels)
    head = classifier.variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(head, state["params"]["head"]["kernel"])


def test_which_step(trained, config):
    workdir, _ = trained
    assert (
        orthojax.load_classifier(workdir).step
        == orthojax.load_classifier(workdir, "latest").step
        == config.steps
    )
    assert (
        orthojax.load_classifier(workdir, 8).step
        == orthojax.load_classifier(workdir, "8").step
        == 8
    )
    with pytest.raises(WorkdirError, match="step 17 .* choose latest or one of 4, 8, 12"):
        orthojax.load_classifier(workdir, 17)
    with pytest.raises(WorkdirError, match="is the best: .* dataset.validation"):
        orthojax.load_classifier(workdir, "best")


@pytest.mark.parametrize("count", [0, 1, 3, 300])
def test_a_batch_of_any_size_gives_every_image_its_own_row(classifier, digits, count):
    images = digits.train.images[:count]
    found = classifier.predict(images)
    assert found.shape == (count, 10) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    for row in range(0, count, 97):
        alone = classifier.predict(images[row])
        np.testing.assert_allclose(alone[0], found[row], rtol=1e-4, atol=1e-6)


def test_a_file_is_what_its_pixels_are(classifier, digits, tmp_path):
    image = digits.test.images[0]
    large = np.kron(image[..., 0], np.ones((5, 5), np.uint8))
    files = {
        "same.png": PIL.Image.fromarray(image[..., 0]),
        "large.png": PIL.Image.fromarray(large),
        "rgb.png": PIL.Image.fromarray(large).convert("RGB"),
        "palette.png": PIL.Image.fromarray(large).convert("P"),
    }
    for name, picture in files.items():
        picture.save(tmp_path / name)
    found = classifier.predict([tmp_path / name for name in files])
    np.testing.assert_array_equal(found, np.repeat(found[:1], len(files), axis=0))
    np.testing.assert_allclose(found[0], classifier.predict(image)[0], rtol=1e-4, atol=1e-6)
    alone = classifier.predict(str(tmp_path / "same.png"))
    np.testing.assert_allclose(alone[0], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), r"images are float32 \(2, 8, 8, 1\), and must be"),
        (np.zeros((2, 9, 8, 1), np.uint8), r"must be uint8 \(N, 8, 8, 1\)"),
        ("there_is_none.png", "there_is_none.png: No such file"),
        ([1, 2], "neither one uint8 array nor paths of pictures: among them is int 1"),
        ([np.zeros((8, 8, 1), np.uint8)], r"among them is ndarray uint8 \(8, 8, 1\)"),
        ({"a.png"}, "must be one uint8 array, or paths of pictures in an order"),
        (None, "images are NoneType None"),
        ("zero\0.png", "null (byte|character)"),
        (__file__, "test_loading.py is no picture"),
    ],
)
def test_what_is_no_image_is_named(classifier, images, message):
    with pytest.raises(DatasetError, match=message):
        classifier.predict(images)


def test_pictures_come_from_any_iterable(classifier, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("orthojax.inference.classifier.LARGEST_BATCH", 2)
    for row in range(3):
        PIL.Image.fromarray(digits.test.images[row, ..., 0]).save(tmp_path / f"{row}.png")
    expected = classifier.predict(digits.test.images[:3])
    paths = sorted(tmp_path.glob("*.png"))
    for images in (iter(paths), tuple(paths), dict.fromkeys(paths)):
        np.testing.assert_allclose(classifier.predict(images), expected, rtol=1e-4, atol=1e-6)
    assert classifier.predict(tmp_path.glob("*.jpg")).shape == (0, 10)
    with pytest.raises(DatasetError, match="no image whose statistics"):
        classifier.recalibrated([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [10, 0]}, "there is a label 10, and labels are 0 to 9"),
        ({"label": [0, -1]}, "there is a label -1"),
        ({"label": [0.0, 1.0]}, r"labels are float64 \(2,\)"),
        ({"mask": None}, "a batch has no 'mask'; give those of `Dataset.test_batches`"),
        ({"mask": [0.0, 0.0]}, "no image in these batches"),
        ({"image": np.zeros((2, 4, 4, 1), np.uint8)}, r"must be uint8 \(N, 8, 8, 1\)"),
    ],
)
def test_batches_that_cannot_be_evaluated_are_named(classifier, changes, message):
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": [0, 1], "mask": [1.0, 1.0]}
    batch = {k: np.asarray(v) for k, v in {**batch, **changes}.items() if v is not None}
    with pytest.raises(DatasetError, match=message):
        evaluate(classifier, [batch])


def test_small_images_are_read_as_photographs_are(tmp_path, monkeypatch):
    """The upper half of 16 bits; what has no known range or too many pixels is refused."""
    given = Preprocessing((32, 32, 1), ("a",), np.zeros((32, 32, 1)), np.ones((32, 32, 1)))
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    for name in ("deep.png", "deep.tif"):
        PIL.Image.fromarray(ramp).save(tmp_path / name)
        np.testing.assert_array_equal(given.read(tmp_path / name)[..., 0], ramp >> 8)
    PIL.Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DatasetError, match="float.tif .*mode F has no known range"):
        given.read(tmp_path / "float.tif")
    tiff = (tmp_path / "deep.tif").read_bytes()
    for tag, value in ((262, 0), (258, 12)):  # levels from white to black, or of 12 bits
        head = struct.pack("<HHI", tag, 3, 1)
        at = tiff.index(head) + len(head)
        (tmp_path / "other.tif").write_bytes(tiff[:at] + bytes([value]) + tiff[at + 1 :])
        with pytest.raises(DatasetError, match="other.tif .*12 bits, or of levels from white"):
            given.read(tmp_path / "other.tif")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
    for name in ("large.png", "large.jpg"):
        PIL.Image.new("RGB", (40, 40)).save(tmp_path / name)
        with pytest.raises(DatasetError, match=f"{name} is no picture that can be read: Decomp"):
            given.read(tmp_path / name)


def test_pictures_are_read_without_the_extra_too(tmp_path, monkeypatch):
    from orthojax.data import jpeg

    monkeypatch.setattr(jpeg, "simplejpeg", None)
    monkeypatch.setattr(jpeg, "cv2", None)
    PIL.Image.new("RGB", (40, 40), (9, 200, 9)).save(tmp_path / "picture.jpg")
    small = Preprocessing((8, 8, 3), ("a",), np.zeros((8, 8, 3)), np.ones((8, 8, 3)))
    assert np.abs(small.read(tmp_path / "picture.jpg") - np.array([9, 200, 9.0])).max() < 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"photographs needs .*cv2: pip .*\[imagenet\]"):
        Preprocessing((8, 8, 3), ("a",), resize=9).read(tmp_path / "picture.jpg")


def test_statistics_of_other_images(classifier, digits):
    """One pass, as in training mode over the same images."""
    images = digits.train.images[:64]
    again = classifier.recalibrated(images)
    inputs = digits.normalize(images)

    @jax.jit
    def expected_and_found():
        trained = classifier.net.apply(
            classifier.variables, inputs, train=True, mutable=["batch_stats"]
        )
        return trained[0], again.net.apply(again.variables, inputs, train=False)

    expected, found = expected_and_found()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert not np.allclose(classifier.logits(images), expected, atol=1e-2)


def test_no_run(tmp_path):
    with pytest.raises(WorkdirError, match="holds no run"):
        orthojax.load_classifier(tmp_path / "nothing")


def test_a_run_from_before_says_what_to_do_and_doing_it_helps(copy, config):
    (copy / "preprocessing.json").unlink()
    with pytest.raises(WorkdirError, match="start its training command once more"):
        orthojax.load_classifier(copy)
    train_and_evaluate(config, copy)
    assert orthojax.load_classifier(copy).step


def test_a_damaged_checkpoint_is_named_with_the_others(copy):
    next((copy / "checkpoints" / "12" / "state" / "d").iterdir()).write_bytes(b"")
    with pytest.raises(
        WorkdirError, match=r"12 cannot be read: state/d/\w+ is damaged.*\n.* 4, 8$"
    ):
        orthojax.load_classifier(copy, "latest")
    assert orthojax.load_classifier(copy, 8).step == 8


def test_a_checkpoint_of_another_model_is_refused(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["model"]["width"] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(WorkdirError, match=r"config\.json is damaged: its checksum"):
        orthojax.load_classifier(copy)
    (copy / "checksums.json").unlink()  # as in a run from before it was kept
    with pytest.raises(
        WorkdirError, match=r"no checkpoint of the model in config.json:\n.*float32\[32, 10\] here"
    ):
        orthojax.load_classifier(copy)


def test_a_run_brings_no_code_along(copy, tmp_path, monkeypatch):
    """Unless its net is named by whoever reads it."""
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs.py").write_text(
        "from orthojax.models import PlainNet\n"
        "open('executed', 'w').close()\n"
        "class Net(PlainNet): pass\n"
    )
    config = json.loads((copy / "config.json").read_text())
    config["model"]["name"] = "theirs:Net"
    (copy / "config.json").write_text(json.dumps(config))
    seal(copy, "config.json")
    for own_net in (None, "others:Net", "theirs:Other"):
        with pytest.raises(
            WorkdirError, match=r"theirs:Net.*load_classifier\(workdir, own_net='theirs:Net'\)"
        ):
            orthojax.load_classifier(copy, own_net=own_net)
    assert not (copy / "executed").exists()
    assert orthojax.load_classifier(copy, own_net="theirs:Net").step
    assert (copy / "executed").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("mean", value) for value in ([0.5], "a", None, np.nan)),
        *(("std", value) for value in (0.0, -1.0, np.inf)),
        *(("image_shape", value) for value in ("abc", [8, 8], [8, 8, 0], [8, 8, 1.5], 8)),
        *(("class_names", value) for value in (10, [], [1, 2], "ab")),
        *(("resize", value) for value in (7, -1, None, 1.5)),
    ],
)
def test_what_is_no_preprocessing_is_named(digits, key, value):
    values = digits.preprocessing.to_json()
    if isinstance(value, float):
        value = np.full((8, 8, 1), value).tolist()
    with pytest.raises(DatasetError, match=rf"^({key}|mean)\b"):
        Preprocessing.from_json({**values, key: value})
    with pytest.raises(DatasetError, match="with the keys"):
        Preprocessing.from_json({k: v for k, v in values.items() if k != key})
    with pytest.raises(DatasetError, match="with the keys"):
        Preprocessing.from_json([values])


def test_names_may_be_changed_and_numbers_may_not(digits):
    values = json.loads(json.dumps(digits.preprocessing.to_json()))
    names = [f"digit {name}" for name in values["class_names"]]
    assert Preprocessing.from_json({**values, "class_names": names}).class_names == tuple(names)
    values["mean"][3][3][0] += 1e-3
    with pytest.raises(DatasetError, match="numbers are not those that were written"):
        Preprocessing.from_json(values)
    del values["checksum"]  # as in a run from before it was kept
    assert Preprocessing.from_json(values).mean[3, 3, 0] == np.float32(values["mean"][3][3][0])


def test_names_of_classes_are_drawn_and_not_obeyed(digits, classifier):
    names = ("$\\frac", "a\x1b[2J", "b\nc", *"3456789")
    renamed = dataclasses.replace(
        classifier, preprocessing=dataclasses.replace(digits.preprocessing, class_names=names)
    )
    picture = evaluate(renamed, [next(iter(digits.test_batches(16)))]).draw()
    picture.savefig(io.BytesIO(), format="png")  # a formula that is none would be an error
    shown = [text.get_text() for text in picture.axes[0].get_xticklabels()]
    assert shown[:3] == [r"\$\frac", r"a\x1b[2J", r"b\nc"]


def test_preprocessing_survives_json_to_the_last_bit(digits):
    given = digits.preprocessing
    again = Preprocessing.from_json(json.loads(json.dumps(given.to_json())))
    np.testing.assert_array_equal(again.mean, given.mean)
    np.testing.assert_array_equal(again.std, given.std)
    assert (again.image_shape, again.class_names) == (given.image_shape, given.class_names)
    assert given.class_names == tuple("0123456789")


def test_photographs_are_read_as_in_evaluation(tmp_path):
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("simplejpeg")
    from orthojax.data import jpeg

    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    path = tmp_path / "photograph.png"
    assert cv2.imwrite(str(path), pixels[..., ::-1])
    expected = np.empty((28, 28, 3), np.uint8)
    jpeg.crop_into(expected, path.read_bytes(), 32, 2, 2)
    given = Preprocessing((28, 28, 3), ("a",), resize=32)
    np.testing.assert_array_equal(given.read(path), expected)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match="no picture"):
        given.read(path)
