"""Several processes as one: joining them, and doing once what must be done once."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from orthojax.errors import ConfigError, UserError
from orthojax.parallel.rendezvous import await_processes, loopback

_MESSAGE_BYTES = 4096


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
) -> None:
    """Joins this process to the others of its run; call it before anything touches a device.

    On Cloud TPU, under Slurm and in a Kubernetes JobSet JAX finds out by itself who the others are;
    elsewhere all three arguments are needed.

    Args:
      coordinator: `HOST:PORT` of process 0, which listens there; where `HOST` is `localhost`, to
        this machine alone.
      processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ConfigError: only some of the three are given, or none and there is nothing to detect.
      ProcessesMissing: after `timeout` some process has not appeared; the message names it.
    """
    given = [coordinator is not None, processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise ConfigError(
            "coordinator, processes and process_id belong together; give all three, or none where "
            "JAX detects them (Cloud TPU, Slurm, Kubernetes)"
        )
    if not any(given):
        coordinator, processes, process_id = _detect(timeout)
    if process_id is not None and not 0 <= process_id < processes:
        raise ConfigError(f"process_id is {process_id}; it must be from 0 to {processes - 1}")
    # Only CPUs look at this: their collectives between processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator is not None:
        # JAX itself ends the process when somebody is missing, and does not say who.
        await_processes(coordinator, processes, process_id, timeout)
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        coordinator_bind_address=_bind_address(coordinator),
        initialization_timeout=max(1, round(timeout)),
    )


def available_devices() -> list[jax.Device]:
    """Those of all processes; `ConfigError` where there is none of the platform asked for."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # a platform is asked for that is not there
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise ConfigError(
            f"JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms}{reason}; unset it "
            "to take what there is, or install what it needs: pip install 'orthojax-nets[cuda]'"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes records and speaks to the user."""
    available_devices()
    return jax.process_index() == 0


def on_first_process(function: Callable[[], None]) -> None:
    """Calls a function in process 0 alone; a `UserError` there is raised in every process."""
    failure, message = None, b""
    if is_first():
        try:
            function()
        except UserError as error:
            failure, message = error, str(error).encode()[:_MESSAGE_BYTES]
    if jax.process_count() > 1:
        padded = np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
        message = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0")
    if failure:
        raise failure
    if message:
        raise UserError(f"process 0 says: {message.decode(errors='replace')}")


def _bind_address(coordinator: str | None) -> str | None:
    """Where JAX's service listens, if not to all machines, which is its default."""
    host, _, port = (coordinator or "").rpartition(":")
    address = loopback(host)
    if address is None:
        return None
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _detect(timeout: float) -> tuple[str | None, int | None, int | None]:
    """What JAX detects, or three times None where only `jax.distributed` itself can say."""
    try:
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, round(timeout)
        )[:3]
    except (ImportError, AttributeError, TypeError):  # no public interface, so it may move
        return None, None, None
    if found[0] is None:
        raise ConfigError(
            "this process cannot tell who the others are: neither Cloud TPU, nor Slurm, nor "
            "Kubernetes, nor Open MPI is detected. Give --coordinator=HOST:PORT, --processes and "
            "--process_id, or leave --distributed out to train on this machine alone"
        )
    return found
