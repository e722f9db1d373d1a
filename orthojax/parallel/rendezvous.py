"""Who is there, before anybody waits for all: so that who is missing has a name."""

import contextlib
import json
import socket
import time

from orthojax.errors import UserError

_RETRY_SECONDS = 0.2


class ProcessesMissing(RuntimeError):
    """Some process of a multi-process run did not appear in time; starting again may help."""


def await_processes(coordinator: str, processes: int, process_id: int, timeout: float) -> None:
    """Returns once all processes have reported to process 0, and raises in all if some do not.

    Process 0 listens at `coordinator` for as long as the call lasts; the others connect and say
    their number. The port is free again afterwards.

    Args:
      coordinator: `HOST:PORT` of process 0.
      processes: how many there are.
      process_id: which one this is.
      timeout: seconds.

    Raises:
      ProcessesMissing: the message names the missing numbers, or one that came twice.

    Example:
      >>> await_processes("localhost:0", processes=1, process_id=0, timeout=1.0)
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the coordinator is {coordinator!r}; it must be HOST:PORT")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _preside(int(port), processes, deadline, timeout)
    else:
        _report(host.strip("[]"), int(port), process_id, deadline, timeout)


def _preside(port: int, processes: int, deadline: float, timeout: float) -> None:
    present: set[int] = set()
    callers: list[socket.socket] = []
    error = ""
    with contextlib.ExitStack() as stack:
        try:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            server = socket.create_server(
                ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError as failure:
            raise UserError(
                f"process 0 cannot listen on port {port} ({failure}); choose another port for the "
                "coordinator"
            ) from None
        stack.enter_context(server)
        while len(present) < processes - 1 and not error:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5.0)
                number = int(_read_line(connection))
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # somebody who connected and said nothing
                missing = sorted(set(range(1, processes)) - present)
                error = (
                    f"waited {timeout:g} s for {processes} processes; missing: "
                    f"{', '.join(map(str, missing))}. Start them with the same --coordinator and "
                    "--processes, each with its own --process_id"
                )
                break
            except (OSError, ValueError):
                continue  # no process of ours
            if number in present or not 0 < number < processes:
                error = f"process_id {number} came twice, or is not one of {processes} processes"
            present.add(number)
            callers.append(connection)
        for connection in callers:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(error).encode() + b"\n")
                # The other side closes first, so that no closing connection holds the port.
                connection.recv(1)
    if error:
        raise ProcessesMissing(error)


def _report(host: str, port: int, process_id: int, deadline: float, timeout: float) -> None:
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ProcessesMissing(
                f"process {process_id} waited {timeout:g} s for process 0 at {host}:{port}, which "
                "is missing or cannot be reached"
            )
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(f"{process_id}\n".encode())
                # Process 0 answers at its own deadline at the latest.
                connection.settimeout(left + 10)
                error = json.loads(_read_line(connection))
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)
            continue
        if error:
            raise ProcessesMissing(error)
        return


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = connection.recv(1024)
        if not piece:
            raise ConnectionError("closed before the end of the line")
        line += piece
    return line
