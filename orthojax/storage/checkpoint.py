"""Checkpoints that are finished or absent, and a restore that survives a damaged one."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from orthojax.console import printable
from orthojax.errors import WorkdirError
from orthojax.storage.checksums import CHECKSUMS, find_damage, write_checksums
from orthojax.storage.paths import is_remote, name_fault, set_aside, to_path
from orthojax.storage.saved import layout_differences, saved_steps


class _WithoutOrbaxChatter(logging.Filter):
    """Drops what orbax tells at levels below WARNING, and nothing of anybody else's.

    Of the errors, those of threads and coroutines that save, with a traceback each: `Checkpointer`
    raises them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        places = [record.pathname]
        if record.exc_info and record.exc_info[2]:
            places += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
        if not any(f"{os.sep}orbax{os.sep}" in place for place in places):
            return True
        return record.levelno >= logging.WARNING and not record.exc_info


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_WithoutOrbaxChatter())


class Restored(NamedTuple):
    """What `Checkpointer.restore_latest` found; see `Checkpointer.save`."""

    step: int
    state: Any
    data_state: dict
    best: dict | None


@dataclasses.dataclass
class _NewestAndBest:
    """Which checkpoints stay, as a `PreservationPolicy` of orbax's."""

    keep: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        newest = len(checkpoints) - self.keep
        return [k >= newest or found.step == self.best for k, found in enumerate(checkpoints)]


class Checkpointer:
    """Saves and restores the training state of one run: the newest `keep` of them, and the best.

    A save is renamed into place once everything is in it, so a process killed at any moment
    leaves the earlier checkpoints as they were. A restore verifies checksums first. (An object
    store has neither renames nor broken files: there orbax marks a checkpoint as finished, and the
    store's own checksums have to do.)

    It is for the one process that trains: it removes what a killed process left, and what is no
    longer kept. Everybody else reads by `orthojax.storage.saved`.

    Args:
      directory: holds one subdirectory for each step; created when missing; may be `gs://…`.
      keep: how many of the newest checkpoints stay; the best stays too, if the newest names one.

    Raises:
      WorkdirError: what is saved there could not be read again, by the name of the directory; or
        there are checkpoints, and all are unreadable.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> state = {"kernel": jnp.eye(2)}
      >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
      ...     checkpointer.save(10, state, {"epoch": 1}, wait=True)
      ...     abstract = jax.tree.map(
      ...         lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
      ...     )
      ...     restored = checkpointer.restore_latest(abstract)
      >>> restored.step, restored.data_state
      (10, {'epoch': 1})
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        # Absolute without following links, as orbax demands.
        self._remote = is_remote(directory)
        path = to_path(directory)
        self._directory = path if self._remote else path.absolute()
        if fault := name_fault(self._directory):
            raise WorkdirError(fault)
        self._kept = _NewestAndBest(keep)
        self._saving_step: int | None = None
        if not self._remote:
            self._set_aside_unlistable()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                cleanup_tmp_directories=True,  # what a killed process left
                # Despite its name it runs before the rename: the checksums cannot be missing
                # from a finished checkpoint.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict,
        *,
        best: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves in the background; a step that is already there is left as it is.

        The values are those at the time of the call: the caller may donate `state` right after.
        What a save in the background failed with is raised by the next call of `save` or `wait`:
        an `OSError` where the disk is full.

        Args:
          step: number of finished training steps.
          state: pytree of jax arrays.
          data_state: position of the data, of JSON's types.
          best: None, or of JSON's types: what is known of the best checkpoint so far, whose number
            is its `step`.
          wait: return only once the checkpoint is finished.
        """
        if step not in self._manager.all_steps():
            self.wait()
            self._saving_step = step
            self._kept.best = best and best["step"]
            position = {"data_state": data_state, "layout": layout(state), "best": best}
            with _storage_errors_named(self._directory):
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(position)
                    ),
                    force=True,
                )
        if wait:
            self.wait()

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """Restores the newest readable checkpoint, or returns None where there is none at all.

        Unreadable checkpoints newer than that are warned about and renamed to `<step>.corrupt`.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, as the state's.

        Raises:
          WorkdirError: the checkpoint is of another model, or there are only unreadable ones.
        """
        self.wait()
        unreadable: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if not self._remote and (reason := find_damage(self._directory / str(step))):
                unreadable[step] = reason
                continue
            restored = self._restore(step, abstract_state)
            for bad_step, reason in unreadable.items():
                self._set_aside(bad_step, reason, step)
            return restored
        if unreadable:
            raise _unreadable(self._directory, unreadable)
        return None

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns once a save in the background is finished."""
        with _storage_errors_named(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes a save in the background and frees the threads."""
        with _storage_errors_named(self._directory):
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        # What a save in the background failed with, too, comes of what is being raised already.
        with contextlib.suppress(*[Exception] if exception[0] else []):
            self.close()

    def _write_checksums(self) -> None:
        if jax.process_index() == 0 and not self._remote:
            # A save that failed earlier may have left a directory of the same step.
            prefix = f"{self._saving_step}.orbax-checkpoint-tmp"
            unfinished = [p for p in self._directory.iterdir() if p.name.startswith(prefix)]
            newest = max(unfinished, key=lambda path: path.stat().st_mtime_ns)
            _forget_devices(newest / "state" / "_sharding")
            write_checksums(newest, [path.name for path in newest.iterdir() if path.is_dir()])

    def _set_aside_unlistable(self) -> None:
        """Finds damage in what orbax reads of every checkpoint at its start, and fails at."""
        if jax.process_index() == 0:
            steps = saved_steps(self._directory)
            damage = {step: _listing_damage(self._directory / str(step)) for step in steps}
            damaged = {step: reason for step, reason in damage.items() if reason}
            whole = [s for s in reversed(steps) if s not in damaged]
            if damaged and not whole:
                raise _unreadable(self._directory, damaged)
            for step, reason in damaged.items():
                self._warn_and_set_aside(step, reason, whole[0])
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("metrics of checkpoints looked at")

    def _restore(self, step: int, abstract_state: Any) -> Restored:
        position = self._manager.restore(
            step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
        ).position
        _check_layout(self._directory / str(step), position["layout"], layout(abstract_state))
        # The leaves are those asked for; an optional part that is None may have no entry on disk.
        wanted = ocp.args.PyTreeRestore(
            abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            partial_restore=True,
        )
        state = self._manager.restore(step, args=ocp.args.Composite(state=wanted)).state
        return Restored(step, state, position["data_state"], position.get("best"))

    def _set_aside(self, step: int, reason: str, restored_step: int) -> None:
        if jax.process_index() == 0:
            self._warn_and_set_aside(step, reason, restored_step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def _warn_and_set_aside(self, step: int, reason: str, restored_step: int) -> None:
        aside = set_aside(self._directory / str(step))
        warnings.warn(
            printable(
                f"the checkpoint of step {step} is unreadable ({reason}); it is kept as {aside}, "
                f"and training goes on from step {restored_step}"
            ),
            stacklevel=4,
        )


def _forget_devices(file: pathlib.Path) -> None:
    """Has plain orbax restore every array whole, on the first device of whoever reads.

    Else it wants the devices that the arrays were saved on.
    """
    whole = {
        "sharding_type": "NamedSharding",
        "shape": [1],
        "axis_names": ["device"],
        "partition_spec": [],
        "device_mesh": {"mesh": [{"id": 0}]},
    }
    if file.exists():  # as there are arrays of JAX
        names = json.loads(file.read_bytes())
        file.write_text(json.dumps(dict.fromkeys(names, json.dumps(whole))), encoding="utf-8")


@contextlib.contextmanager
def _storage_errors_named(directory: Any) -> Iterator[None]:
    """TensorStore says in a ValueError what the operating system refused."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(found[1]) if found else errno.ENOSPC
        if not found and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(number, os.strerror(number), os.fspath(directory)) from error


def _listing_damage(checkpoint: pathlib.Path) -> str | None:
    if not (checkpoint / CHECKSUMS).exists():
        return None  # a removal that was interrupted: orbax ends it after the next save
    metadata = checkpoint / "_CHECKPOINT_METADATA"
    with contextlib.suppress(OSError, ValueError):  # which orbax does without
        if not isinstance(json.loads(metadata.read_bytes()), dict):
            return f"{metadata.name} is damaged"
    return None


def _unreadable(directory: Any, reasons: dict[int, str]) -> WorkdirError:
    lines = "".join(f"\n  step {step}: {why}" for step, why in reasons.items())
    return WorkdirError(
        f"no checkpoint in {directory} can be read:{lines}\n"
        "Move that directory away to train from the beginning."
    )


def layout(state: Any) -> dict[str, str]:
    """Describes a state as {path of a leaf: dtype and shape}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _check_layout(path: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    if different := layout_differences(saved, wanted):
        raise WorkdirError(
            f"{path} is a checkpoint of another model:{different}\n"
            "Choose another --workdir, or run with the config and code that wrote it."
        )
