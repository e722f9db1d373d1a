"""Pictures in folders, through the pipeline that photographs take: order, labels, broken files."""

import io
import json
import shutil

import numpy as np
import PIL.Image
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

pytest.importorskip("grain")
pytest.importorskip("simplejpeg")
pytest.importorskip("cv2")

import orthojax
from orthojax import data
from orthojax.data import jpeg, sampler
from orthojax.data.folder import files
from orthojax.errors import DatasetError, WorkdirError
from orthojax.inference.evaluation import evaluate
from orthojax.training.experiment import build
from orthojax.training.train import train_and_evaluate
from tests.training.tiny import tiny_config

CLASSES = ("ant", "bee", "cow")
OWN = f"{__name__}:ColorNet"  # the net of these runs
OPTIONS = dict(resize=20, crop=16, workers=0)


def picture(seed, side=30, mode="RGB"):
    """A plain color with some noise, its class's own hue, in any mode."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side + 4, 3)) + 40 + 60 * (np.arange(3) == seed % 3)
    pixels = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def fill(root, classes=CLASSES, count=8):
    for split, start in (("train", 0), ("test", 100)):
        for label, name in enumerate(classes):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                seed = 3 * (start + index) + label
                picture(seed).save(place / f"{index:02d}.jpg")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = fill(tmp_path_factory.mktemp("pictures"))
    (root / "train" / "bee" / "deeper").mkdir()
    for mode, suffix in (("L", ".PNG"), ("P", ".gif"), ("RGBA", ".png")):
        picture(1, mode=mode).save(root / "train" / "bee" / "deeper" / f"{mode}{suffix}")
    (root / "train" / "bee" / "notes.txt").write_text("no picture")
    (root / "train" / ".hidden").mkdir()
    return root


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "pictures")


def test_what_lies_where(root):
    train = files(root, "train")
    assert train.class_names == CLASSES and len(train) == 27
    assert train.labels == (0,) * 8 + (1,) * 11 + (2,) * 8
    assert sorted(train.paths) == list(train.paths)
    encoded, label = train[26]
    assert label == 2 and encoded == (root / "train" / "cow" / "07.jpg").read_bytes()


def test_batches_are_the_pictures_at_their_places_of_the_stream(root):
    """Order and crops as for photographs of any other source."""
    dataset = data.load("folder", str(root), **OPTIONS)
    batch = next(dataset.train_batches(10, seed=4))
    train = files(root, "train")
    for row in range(10):
        image = sampler.image(4, len(train), row)
        left, top = sampler.random_words(4, len(train), row, 2) % 5
        expected = np.empty((16, 16, 3), np.uint8)
        encoded, label = train[image]
        jpeg.crop_into(expected, encoded, 20, int(left), int(top))
        np.testing.assert_array_equal(batch["image"][row], expected)
        assert batch["label"][row] == label
    assert dataset.image_shape == (16, 16, 3) and dataset.num_classes == 3
    assert dataset.preprocessing.class_names == CLASSES


def test_worker_processes_change_nothing(root):
    here = data.load("folder", str(root), **OPTIONS)
    there = data.load("folder", str(root), **{**OPTIONS, "workers": 1})
    batches = there.train_batches(12, seed=0)
    for _, ours, theirs in zip(range(4), here.train_batches(12, seed=0), batches, strict=False):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
    batches.close()


def test_links_are_followed_and_what_is_left_out_is_said(copy, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(copy / "train" / "ant", elsewhere)
    (copy / "train" / "dog").symlink_to(elsewhere)
    (copy / "train" / "bee" / "2025").symlink_to(elsewhere)
    (copy / "train" / "cow" / "one.jpg").symlink_to(elsewhere / "00.jpg")
    for place in ("bee/.ipynb_checkpoints", "cow/below/.thumbnails"):
        (copy / "train" / place).mkdir(parents=True)
        shutil.copy(elsewhere / "00.jpg", copy / "train" / place)
    shutil.copy(elsewhere / "00.jpg", copy / "train" / "of_no_class.jpg")
    capsys.readouterr()
    found = files(copy, "train")
    assert np.bincount(found.labels).tolist() == [8, 11 + 8, 8 + 1, 8]
    told = capsys.readouterr().err
    assert "train: left out, as hidden or no picture of a class: .hidden" in told
    assert told.count("\n") == 1 and "and 2 more" in told
    data.load("folder", str(copy), **OPTIONS, train_split="test")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("bee/gone.png", "unmounted.png", "bee/gone.png is a link to unmounted.png, which is not"),
        ("bee/2025", "unmounted", "bee/2025 is a link to unmounted, which is not there"),
        ("dog", "unmounted", "train/dog is a link to unmounted, which is not there"),
        ("bee/back", "..", "bee/back is a link back to a folder that it lies in"),
        ("dog", ".", "train/dog is a link back to a folder that it lies in"),
    ],
)
def test_a_link_that_leads_to_no_picture_is_an_error(copy, link, target, message):
    (copy / "train" / link).symlink_to(target)
    with pytest.raises(DatasetError, match=message):
        files(copy, "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_broken_pictures_is_refused_at_the_start(copy, split):
    for path in (copy / split).glob("*/**/*.*"):
        path.write_bytes(b"x")
    with pytest.raises(DatasetError, match=f"{split}/ant/00.jpg of split .* put whole pictures"):
        data.load("folder", str(copy), **OPTIONS)


def test_pictures_that_all_break_later_are_named(copy):
    dataset = data.load("folder", str(copy), **OPTIONS)
    for path in copy.glob("*/*/**/*.*"):
        path.write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(DatasetError, match="not one of 24 images in a"):
        list(dataset.test_batches(16))
    with pytest.raises(DatasetError, match="not one of 100 images in a row can be decoded"):
        next(dataset.train_batches(4, seed=0))


def test_broken_files_are_replaced_and_counted(copy):
    for name in ("00.jpg", "01.jpg"):
        path = copy / "train" / "cow" / name
        path.write_bytes(path.read_bytes()[:60])
    (copy / "test" / "ant" / "03.jpg").write_bytes(b"")
    dataset = data.load("folder", str(copy), **OPTIONS)
    with pytest.warns(UserWarning) as told:
        batches = dataset.train_batches(9, seed=0)
        for _ in range(3):
            next(batches)
    assert "2 images of split 'train'" in str(told[-1].message)
    with pytest.warns(UserWarning, match="test/ant/03.jpg of split 'test' .* is left out"):
        masks = [batch["mask"].sum() for batch in dataset.test_batches(24)]
    assert sum(masks) == 23


@pytest.mark.parametrize("name", ["validation", "val"])
def test_other_names_of_the_test_images(copy, name):
    (copy / "test").rename(copy / name)
    assert data.load("folder", str(copy), **OPTIONS).test_size == 24


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "there is no folder .*train; pictures are looked for"),
        (lambda root: shutil.rmtree(root / "test"), "no folder test, validation or val beside"),
        (lambda root: (root / "test" / "dog").mkdir(), "class 'dog', which training does not"),
        (lambda root: (root / "train" / "dog").mkdir(), "train/dog holds no picture"),
        (lambda root: [shutil.rmtree(root / "train" / c) for c in CLASSES[1:]], "holds 1 folders"),
        (lambda root: [p.unlink() for p in root.glob("test/*/*")], "test holds no picture"),
    ],
    ids=["nothing", "no test", "unknown class", "empty class", "one class", "empty test"],
)
def test_what_is_wrong_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(DatasetError, match=message):
        data.load("folder", str(copy), **OPTIONS)


def test_a_stream_of_other_files_is_not_gone_on_with(copy, root):
    state = data.load("folder", str(root), **OPTIONS).train_batches(4, seed=0).get_state()
    same = data.load("folder", str(copy), **OPTIONS).train_batches(4, seed=0)
    same.set_state({**state, "position": 8})
    assert same.get_state()["position"] == 8
    (copy / "train" / "bee" / "00.jpg").rename(copy / "train" / "bee" / "99.jpg")
    other = data.load("folder", str(copy), **OPTIONS).train_batches(4, seed=0)
    with pytest.raises(DatasetError, match="of a split of other files: some were renamed"):
        other.set_state(state)


def test_a_file_that_goes_away_is_named(copy):
    dataset = data.load("folder", str(copy), **OPTIONS)
    for path in copy.glob("test/ant/*"):
        path.unlink()
    with pytest.raises(DatasetError, match="00.jpg: No such file or directory; put it back"):
        next(dataset.test_batches(4))


def test_without_a_place():
    with pytest.raises(DatasetError, match="say where the pictures are: dataset.data_dir=DIR"):
        data.load("folder")


def test_pictures_are_held_out_of_every_class(root):
    found = data.load("folder", str(root), **OPTIONS, validation=0.25)
    assert (found.train_size, found.validation_size, found.test_size) == (20, 7, 24)
    [batch] = found.validation_batches(7)
    assert set(batch["label"]) == {0, 1, 2}
    trained = {found.train.describe(index) for index in range(20)}
    assert not trained & {found.validation.describe(index) for index in range(7)}


def test_fake_data_has_the_same_shapes(root):
    fake = data.fake_data("folder", str(root), **OPTIONS)
    assert next(fake.train_batches(4, seed=0))["image"].shape == (4, 16, 16, 3)
    assert fake.num_classes == 3
    assert build(folder_config(root), records=False).dataset.image_shape == (16, 16, 3)


class ColorNet(nn.Module):
    """Tells colors apart; quick to compile."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        del train
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(16)(images.mean((1, 2)))))


def folder_config(root):
    config = tiny_config(60, batch_size=8)
    config.model = ConfigDict({"name": OWN})
    config.optimizer.learning_rate = 0.05
    with config.unlocked(), config.ignore_type():
        config.dataset = {"name": "folder", "data_dir": str(root), **OPTIONS, "color_std": 0.0}
    return config


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train_and_evaluate(folder_config(root), workdir)


def test_a_net_learns_the_pictures_and_knows_their_classes(root, trained):
    workdir, summary = trained
    assert summary["test_accuracy"] > 0.9
    net = orthojax.load_classifier(workdir, own_net=OWN)
    names = [root / "test" / name / "00.jpg" for name in CLASSES]
    found = net.predict(names).argmax(axis=1)
    assert [net.class_names[k] for k in found] == list(CLASSES)
    saved = json.loads((workdir / "preprocessing.json").read_text())
    assert saved["class_names"] == list(CLASSES)


def test_bytes_of_a_picture_decide_and_not_its_name(root, trained, tmp_path):
    file = io.BytesIO()
    PIL.Image.open(root / "test" / "ant" / "00.jpg").save(file, "PNG")
    (tmp_path / "picture.jpg").write_bytes(file.getvalue())
    net = orthojax.load_classifier(trained[0], own_net=OWN)
    expected = net.predict(root / "test" / "ant" / "00.jpg")
    np.testing.assert_allclose(net.predict(tmp_path / "picture.jpg"), expected, atol=1e-5)


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def rename_a_class(root):
    for split in ("train", "test"):
        (root / split / "bee").rename(root / split / "a_bee")


def add_a_class(root):
    for split in ("train", "test"):
        shutil.copytree(root / split / "cow", root / split / "dog")


@pytest.mark.parametrize("change", [rename_a_class, add_a_class])
@pytest.mark.parametrize("steps", [60, 80])
def test_a_run_on_other_classes_is_refused_before_anything_is_written(
    copy, trained, tmp_path, change, steps
):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    change(copy)
    before, config = contents(workdir), folder_config(copy)
    config.steps = steps
    with pytest.raises(WorkdirError, match="trained on other data .*\n  class_names: 'ant', 'bee'"):
        train_and_evaluate(config, workdir)
    assert contents(workdir) == before


def test_labels_are_compared_by_name(copy, trained):
    net = orthojax.load_classifier(trained[0], own_net=OWN)
    for split in ("train", "test"):
        shutil.rmtree(copy / split / "ant")
    fewer = data.load("folder", str(copy), **OPTIONS)
    found = evaluate(net, fewer.test_batches(16), fewer.preprocessing.class_names)
    assert found.accuracy > 0.9 and found.confusion.sum(axis=1).tolist() == [0, 8, 8]
    rename_a_class(copy)
    other = data.load("folder", str(copy), **OPTIONS)
    with pytest.raises(DatasetError, match="the class 'a_bee', which the net does not have: it"):
        evaluate(net, other.test_batches(16), other.preprocessing.class_names)
