"""ImageNet's archives, through TFDS's own builder, to batches; on a miniature of few photographs.

`ORTHOJAX_IMAGENET_MANUAL_DIR` is a directory with `ILSVRC2012_img_train.tar` and
`ILSVRC2012_img_val.tar`, laid out as the official ones.
"""

import collections
import importlib.util
import itertools
import json
import os
import pathlib
import tarfile

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import linen as nn

from orthojax.data import load, source
from orthojax.training.state import TrainState
from orthojax.training.step import make_eval_step
from tests.data.prepare_data import prepare_data

ARCHIVES = os.environ.get("ORTHOJAX_IMAGENET_MANUAL_DIR")
MINIATURE = 2**30  # bytes of the largest that these tests take

NEEDED = ("tensorflow", "importlib_resources", "grain", "simplejpeg", "cv2")
MISSING = [package for package in NEEDED if importlib.util.find_spec(package) is None]

pytestmark = [
    pytest.mark.skipif(not ARCHIVES, reason="ORTHOJAX_IMAGENET_MANUAL_DIR is not set"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def archived():
    """The file names in the archives of each split, with the contents of the files."""
    train, validation = (
        pathlib.Path(ARCHIVES) / f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")
    )
    if train.stat().st_size > MINIATURE:
        pytest.skip("the archives are the whole of ImageNet, which takes hours")
    found = {"train": {}}
    with tarfile.open(train) as classes:
        for member in classes:
            found["train"] |= contents(classes.extractfile(member))
    with validation.open("rb") as file:
        found["validation"] = contents(file)
    return found


def contents(file):
    with tarfile.open(fileobj=file) as images:
        return {member.name: images.extractfile(member).read() for member in images}


@pytest.fixture(scope="module")
def data_dir(archived, tmp_path_factory):
    """Holds `imagenet2012` and `imagenet2012_256`, both prepared by one command."""
    place = str(tmp_path_factory.mktemp("tfds"))
    places = (f"--data_dir={place}", f"--manual_dir={ARCHIVES}")
    done = prepare_data("imagenet2012", "--resize=256", *places, timeout=600)
    assert done.stdout.endswith(f"{place}/imagenet2012_256/5.1.0\n")
    return place


def examples(name, data_dir, split):
    """File names and labels in the order of the records."""
    builder = source.named_builder(name, data_dir)
    decoders = {"image": tfds.decode.SkipDecoding()}
    found = builder.as_data_source(split, decoders=decoders)
    return [(e["file_name"].decode(), int(e["label"])) for e in found]


def take(dataset, batch_size, count, state=None):
    batches = dataset.train_batches(batch_size, seed=5)
    if state is not None:
        batches.set_state(state)
    found = list(itertools.islice(batches, count))
    return found, batches.get_state()


@pytest.fixture(scope="module")
def validation(data_dir):
    """The batches of 32 of one pass."""
    return list(load("imagenet2012", data_dir, workers=2).test_batches(32))


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet2012_256"])
def test_every_photograph_of_the_archives_is_there_with_its_class(name, data_dir, archived):
    dataset = load(name, data_dir)
    assert dataset.num_classes == 1000
    assert (dataset.train_size, dataset.test_size) == (
        len(archived["train"]),
        len(archived["validation"]),
    )
    classes = source.find(name, data_dir).builder.info.features["label"].names
    for split, expected in archived.items():
        found = examples(name, data_dir, split)
        assert sorted(file_name for file_name, _ in found) == sorted(expected)
        if split == "train":  # the file names begin with the class
            assert all(f.split("_")[0] == classes[label] for f, label in found)


def test_evaluation_sees_every_image_exactly_once(data_dir, validation, archived):
    expected = [label for _, label in examples("imagenet2012", data_dir, "validation")]
    assert len(validation) == -(-len(expected) // 32)
    assert all(batch["image"].shape == (32, 224, 224, 3) for batch in validation)
    images, labels, mask = (
        np.concatenate([batch[key] for batch in validation]) for key in ("image", "label", "mask")
    )
    assert mask.sum() == len(expected) and mask[: len(expected)].all()
    assert labels[: len(expected)].tolist() == expected
    # Some photographs of the miniature are in its archive under two names.
    times = collections.Counter(image.tobytes() for image in images[: len(expected)]).values()
    archived_times = collections.Counter(archived["validation"].values()).values()
    assert sorted(times) == sorted(archived_times)


class LinearNet(nn.Module):
    """Linear in the means of 8x8 squares."""

    @nn.compact
    def __call__(self, images, train):
        means = nn.avg_pool(images, (28, 28), (28, 28))
        return nn.Dense(1000)(means.reshape(len(images), -1))


def test_top1_and_top5_are_those_of_the_whole_split(data_dir, validation):
    """Of a linear net that knows every fourth image, and every other among its first five."""
    dataset = load("imagenet2012", data_dir)
    images, labels, mask = (
        np.concatenate([batch[key] for batch in validation]) for key in ("image", "label", "mask")
    )
    images, labels = images[mask > 0], labels[mask > 0]
    pixels = np.asarray(dataset.normalize(images), np.float64)
    means = pixels.reshape(-1, 8, 28, 8, 28, 3).mean((2, 4)).reshape(len(images), -1)
    targets = np.eye(1000)[labels[::2]]
    targets[::2, :4] += 2  # half of what it is taught comes after four other classes
    kernel = np.linalg.lstsq(means[::2], targets)[0]
    ranking = np.argsort(-means @ kernel, axis=1)
    expected = {
        "correct": (ranking[:, 0] == labels).sum(),
        "correct_top5": (ranking[:, :5] == labels[:, None]).any(1).sum(),
        "count": len(labels),
    }
    assert 20 < expected["correct"] < expected["correct_top5"] - 20 < len(labels) - 20

    params = {"Dense_0": {"kernel": kernel.astype(np.float32), "bias": np.zeros(1000, np.float32)}}
    state = TrainState(step=0, params=params, batch_stats={}, moments={}, opt_state=())
    step = jax.jit(make_eval_step(LinearNet(), dataset.normalize))
    sums = [step(state, batch) for batch in validation]
    assert {name: sum(float(s[name]) for s in sums) for name in expected} == expected


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet2012_256"])
def test_a_resumed_stream_goes_on_with_the_same_batch(name, data_dir):
    dataset = load(name, data_dir, workers=0)
    undisturbed, _ = take(dataset, 24, 4)
    _, state = take(dataset, 24, 3)
    [resumed], _ = take(load(name, data_dir, workers=0), 24, 1, json.loads(json.dumps(state)))
    for key, value in undisturbed[3].items():
        np.testing.assert_array_equal(resumed[key], value)
    assert (undisturbed[2]["image"] != resumed["image"]).any()


def test_the_squares_agree_with_the_photographs(data_dir, validation, archived):
    for split in archived:
        squares, photographs = (
            examples(name, data_dir, split) for name in ("imagenet2012_256", "imagenet2012")
        )
        assert squares == photographs
    psnr = []
    for batch, expected in zip(
        load("imagenet2012_256", data_dir, workers=0).test_batches(32), validation, strict=True
    ):
        np.testing.assert_array_equal(batch["label"], expected["label"])
        np.testing.assert_array_equal(batch["mask"], expected["mask"])
        difference = batch["image"].astype(float) - expected["image"]
        errors = np.square(difference).mean((1, 2, 3))[expected["mask"] > 0]
        psnr.extend(10 * np.log10(255**2 / errors))
    # The rounding of windows to whole pixels of the photograph is in it, besides JPEG's loss.
    assert np.mean(psnr) > 36 and np.min(psnr) > 25, "dB"
