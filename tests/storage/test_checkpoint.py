"""Checkpoints: bit for bit, finished or absent, and never of another model."""

import asyncio
import contextlib
import errno
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from orthojax.errors import WorkdirError
from orthojax.storage.checkpoint import Checkpointer


class Moments(NamedTuple):
    second_moment: jax.Array
    count: jax.Array


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: Any
    modulation: Any
    empty: dict
    transformation: Any = flax.struct.field(pytree_node=False)


TRANSFORMATION = optax.chain(optax.clip(1.0), optax.sgd(optax.constant_schedule(0.1), 0.9))


def make_state(seed=0, width=16):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, width, width))},
        "dense/0": {"bias": jax.random.normal(keys[1], (width,), jnp.bfloat16)},
    }
    # NaN payloads and negative zeros must survive as well.
    odd = jnp.array([0x7FC00001, 0xFF800000, 0x80000000, 1], jnp.uint32)
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=TRANSFORMATION.init(params),
        modulation=[Moments(jnp.float32(0.1), jnp.uint8(seed)), Moments(odd.view("float32"), None)],
        empty={},
        transformation=TRANSFORMATION,
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same_bits(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {"epoch": step, "position": [0, 128]})
    return directory


@pytest.fixture
def directory(two_checkpoints, tmp_path):
    return pathlib.Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


def test_round_trip_is_bitwise(two_checkpoints):
    with Checkpointer(two_checkpoints) as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = checkpointer.restore_latest(abstract(make_state()))
    assert restored.step == 2
    assert restored.data_state == {"epoch": 2, "position": [0, 128]}
    assert_same_bits(restored.state, make_state(2))
    assert restored.state.transformation is TRANSFORMATION


def test_shardings_are_those_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kernels = [jax.device_put(np.arange(32.0, dtype="f4"), where) for where in (split, whole, one)]
    for number, saved in enumerate(kernels):
        with Checkpointer(tmp_path / str(number)) as checkpointer:
            checkpointer.save(1, {"kernel": saved}, {}, wait=True)
            for kernel in kernels:
                restored = checkpointer.restore_latest(abstract({"kernel": kernel}))
                assert_same_bits(restored.state, {"kernel": kernel})


def test_plain_orbax_reads_on_one_device_what_many_have_saved(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jax.device_put(np.arange(32.0), NamedSharding(mesh, PartitionSpec("data")))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"kernel": kernel}, {}, wait=True)
    with ocp.StandardCheckpointer() as reader, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the topology may be another
        found = reader.restore(tmp_path / "1" / "state")["kernel"]
    assert found.sharding.device_set == {jax.devices()[0]}
    np.testing.assert_array_equal(found, kernel)


@pytest.mark.parametrize("name", ["run[1]", "run*", "a?/run", "a\\b"])
def test_a_name_that_could_not_be_read_again_is_refused(tmp_path, name):
    with pytest.raises(WorkdirError, match="could not be read again"):
        Checkpointer(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"kernel": jnp.zeros((512, 512))}
    with Checkpointer(tmp_path) as checkpointer:
        for count in range(1, 6):
            state = step(state)
            checkpointer.save(count, state, {})
            saved = abstract(state)
            for _ in range(3):
                state = step(state)
            restored = checkpointer.restore_latest(saved)
            assert restored.step == count
            assert np.unique(restored.state["kernel"]) == [4 * count - 3]


def test_the_newest_are_kept_and_saving_twice_is_no_error(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore_latest({"a": jax.ShapeDtypeStruct((), "float32")}) is None
        for step in (1, 2, 3, 3):
            checkpointer.save(step, {"a": jnp.float32(step)}, {})
        assert checkpointer.latest_step() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    best = [None, {"step": 2}, {"step": 2}, {"step": 4, "accuracy": 0.9}]
    for steps in ((1, 2, 3, 4, 5), (6, 7, 8)):  # and still after a restart
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            for step in steps:
                found = best[min(step, 4) - 1]
                checkpointer.save(step, {"a": jnp.float32(step)}, {}, best=found, wait=True)
            restored = checkpointer.restore_latest({"a": jax.ShapeDtypeStruct((), "float32")})
            assert restored.best == {"step": 4, "accuracy": 0.9}
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [4, 7, 8]


def damage(file, how):
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def largest_file(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda x: x.stat().st_size
    )


@pytest.mark.parametrize("how", ["missing", "truncated", "one bit"])
@pytest.mark.parametrize(
    "pick",
    [largest_file, lambda d: d / "position" / "metadata", lambda d: d / "checksums.json"],
    ids=["arrays", "position", "checksums"],
)
def test_damage_falls_back_visibly_and_keeps_the_evidence(directory, capfd, pick, how):
    damage(pick(directory / "2"), how)
    left = {path.name for path in (directory / "2").rglob("*")}
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match=r"step 2 is unreadable \(.*step 1") as caught:
            checkpointer = stack.enter_context(Checkpointer(directory))
            restored = checkpointer.restore_latest(abstract(make_state()))
        assert len(caught) == 1 and str(directory / "2.corrupt") in str(caught[0].message)
        assert restored.step == 1 and restored.data_state["epoch"] == 1
        assert_same_bits(restored.state, make_state(1))
        assert checkpointer.latest_step() == 1
        # The resumed run comes by that step again, and its checkpoint may go bad once more.
        checkpointer.save(2, make_state(2), {"epoch": 2}, wait=True)
        assert checkpointer.restore_latest(abstract(make_state())).step == 2
        damage(largest_file(directory / "2"), "truncated")
        with pytest.warns(UserWarning, match="step 2 is unreadable"):
            assert checkpointer.restore_latest(abstract(make_state())).step == 1
    assert {path.name for path in (directory / "2.corrupt").rglob("*")} == left
    assert {path.name for path in directory.iterdir()} == {"1", "2.corrupt", "2.corrupt.corrupt"}
    # Orbax, asked to read damaged arrays, prints hundreds of lines.
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["checksums.json", "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", ["null", "[1]"])
def test_json_of_another_kind_is_damage(directory, name, content):
    (directory / "2" / name).write_text(content)
    with pytest.warns(UserWarning, match="step 2 is unreadable"), Checkpointer(directory) as saved:
        assert saved.restore_latest(abstract(make_state())).step == 1


def test_no_readable_checkpoint_is_an_error_and_changes_nothing(directory):
    for step in "12":
        damage(largest_file(directory / step), "truncated")
    with Checkpointer(directory) as checkpointer, pytest.raises(WorkdirError) as error:
        checkpointer.restore_latest(abstract(make_state()))
    for words in (str(directory), "step 2: state/", "step 1: state/", "Move that directory away"):
        assert words in str(error.value)
    assert {path.name for path in directory.iterdir()} == {"1", "2"}


def test_another_model_is_refused_and_not_taken_for_damage(directory):
    state = make_state(width=8)
    params = {"conv": state.params["conv"], "head": {"bias": jnp.zeros(3)}}
    with Checkpointer(directory) as checkpointer, pytest.raises(WorkdirError) as error:
        checkpointer.restore_latest(abstract(state.replace(params=params, modulation=[])))
    for words in [
        f"{directory / '2'} is a checkpoint of another model",
        "params/conv/kernel: float32[3, 3, 16, 16] in the checkpoint, float32[3, 3, 8, 8] here",
        "params/dense/0/bias: bfloat16[16] in the checkpoint, absent here",
        "and 3 more",
        "another --workdir",
    ]:
        assert words in str(error.value)
    assert {path.name for path in directory.iterdir()} == {"1", "2"}


def test_another_dtype_is_another_model(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.zeros(2)}, {}, wait=True)
        with pytest.raises(WorkdirError, match=r"a: float32\[2\] in .*, bfloat16\[2\] here"):
            checkpointer.restore_latest({"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})


def test_a_checkpoint_from_before_an_optional_part_was_added_is_restored(tmp_path):
    kernel = jnp.arange(6.0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"kernel": kernel}, {}, wait=True)
        for state in ({"kernel": kernel}, {"kernel": kernel, "loss_scale": None}):
            assert_same_bits(checkpointer.restore_latest(abstract(state)).state, state)


SAVE_FOR_EVER = textwrap.dedent("""
    import itertools, sys
    import jax.numpy as jnp
    from orthojax.storage.checkpoint import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], keep=2)
    first = (checkpointer.latest_step() or 0) + 1
    for step in itertools.count(first):
        state = {name: jnp.full((300, 300), step, "float32") for name in "abcd"}
        checkpointer.save(step, state, {"step": step}, wait=step == first)
        if step == first:
            print(step, flush=True)
""")


def test_kill_during_saves_leaves_a_usable_checkpoint(tmp_path):
    wanted = {
        name: jax.ShapeDtypeStruct((300, 300), jnp.float32, sharding=jnp.zeros(()).sharding)
        for name in "abcd"
    }
    interrupted = 0
    for delay in (0.02, 0.06, 0.11, 0.005, 0.17, 0.04, 0.08):
        if interrupted == 2:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE
        )
        first = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        interrupted += any("tmp" in path.name for path in tmp_path.iterdir())
        with Checkpointer(tmp_path, keep=2) as checkpointer, warnings.catch_warnings():
            warnings.simplefilter("error")
            restored = checkpointer.restore_latest(wanted)
        assert restored.step >= first
        assert restored.data_state == {"step": restored.step}
        assert {float(x) for leaf in restored.state.values() for x in np.unique(leaf)} == {
            restored.step
        }
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(restored.step + 1, restored.state, {}, wait=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        str(restored.step),
        str(restored.step + 1),
    }
    assert interrupted, "no process was killed in the middle of a save: the test shows nothing"


def test_a_removal_that_was_interrupted_is_ended(tmp_path):
    state = {"kernel": jnp.eye(2)}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, {}, wait=True)
    for name in ("checksums.json", "position/metadata"):
        (tmp_path / "1" / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            assert checkpointer.restore_latest(abstract(state)).step == 2
            checkpointer.save(3, state, {}, wait=True)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (ValueError("RESOURCE_EXHAUSTED: Error writing"), errno.ENOSPC),
        (ValueError("Failed to open: Read-only [os_error_code='30']"), errno.EROFS),
    ],
)
def test_a_refusal_is_raised_once_and_told_by_nobody_else(
    tmp_path, monkeypatch, capfd, failure, number
):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.zeros(2)}, {}, wait=True)

        def full(*arguments):
            raise failure

        monkeypatch.setattr("orthojax.storage.checkpoint.write_checksums", full)
        checkpointer.save(2, {"a": jnp.zeros(2)}, {})
        with pytest.raises(OSError, match=os.strerror(number)) as error:
            checkpointer.wait()
        assert error.value.errno == number
        assert checkpointer.latest_step() == 1
    assert not capfd.readouterr().err


def test_only_the_chatter_of_orbax_is_silenced(tmp_path, caplog):
    absl = logging.getLogger("absl")
    caplog.set_level(logging.DEBUG, logger="absl")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.zeros(2)}, {}, wait=True)
    loop = asyncio.new_event_loop()  # says of an orphaned error what nobody needs to hear twice
    with ocp.StandardCheckpointer() as reader:
        error = pytest.raises(FileNotFoundError, reader.restore, tmp_path / "none").value
    loop.call_exception_handler({"message": "never retrieved", "exception": error})
    loop.close()
    absl.info("from the user")
    assert [record.getMessage() for record in caplog.records] == ["from the user"]
