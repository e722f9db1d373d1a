"""Finds missing processes before `jax.distributed` blocks, and names them."""

import contextlib
import ipaddress
import json
import re
import selectors
import socket
import time

from orthojax.errors import UserError

_RETRY_SECONDS = 0.2
_GRACE_SECONDS = 5.0  # for process 0's answer to arrive, after the deadline
_GREETING, _ANSWER = 20, 2**16  # bytes at most


class ProcessesMissing(RuntimeError):
    """Some process of a multi-process run did not appear in time; starting again may help."""


def await_processes(coordinator: str, processes: int, process_id: int, timeout: float) -> None:
    """Returns once all processes have reported to process 0, and raises in all if some do not.

    Process 0 listens at the port of `coordinator` for as long as the call lasts, to other machines
    too unless that is this machine's loopback (see `loopback`); the others connect and say their
    number. The port is free again afterwards. No caller, however slow, keeps anybody waiting beyond
    the timeout and a few seconds.

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
        _preside(host, int(port), processes, deadline, timeout)
    else:
        _report(host.strip("[]"), int(port), process_id, deadline, timeout)


def loopback(host: str) -> str | None:
    """The address of a host that names this machine to itself alone, or None.

    A name of the machine's own that only its `/etc/hosts` leads to the loopback is none of these:
    to other machines it is another address.

    Example:
      >>> loopback("127.0.0.1"), loopback("[::1]"), loopback("node7")
      ('127.0.0.1', '::1', None)
    """
    host = host.strip("[]").lower()
    if re.fullmatch(r"(.*\.)?localhost\.?|localhost\.localdomain|ip6-(localhost|loopback)", host):
        with contextlib.suppress(OSError):
            found = sorted(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM))  # IPv4 first
            return str(found[0][4][0])
        return "127.0.0.1"
    with contextlib.suppress(ValueError):
        return host if ipaddress.ip_address(host).is_loopback else None
    return None


def _listen(host: str, port: int) -> socket.socket:
    address = loopback(host)
    if address is not None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _preside(host: str, port: int, processes: int, deadline: float, timeout: float) -> None:
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(host, port))
        except OSError as failure:
            raise UserError(
                f"process 0 cannot listen on port {port} ({failure}); choose another port for the "
                "coordinator"
            ) from None
        callers, error = _call_roll(server, processes, deadline, timeout, stack)
        answer = json.dumps(error).encode() + b"\n"
        end = time.monotonic() + _GRACE_SECONDS
        for connection in callers:
            with contextlib.suppress(OSError):
                connection.settimeout(max(end - time.monotonic(), 0.001))
                connection.sendall(answer)
                # The other side closes first, so that no closing connection holds the port.
                connection.recv(1)
    if error:
        raise ProcessesMissing(error)


def _call_roll(
    server: socket.socket,
    processes: int,
    deadline: float,
    timeout: float,
    stack: contextlib.ExitStack,
) -> tuple[list[socket.socket], str]:
    """The connections of those who said their number, and what is wrong with them or missing."""
    callers: list[socket.socket] = []
    missing = set(range(1, processes))
    said: dict[socket.socket, bytes] = {}
    waiting = stack.enter_context(selectors.DefaultSelector())
    server.setblocking(False)
    waiting.register(server, selectors.EVENT_READ)
    while missing:
        left = deadline - time.monotonic()
        if left <= 0:
            return callers, (
                f"waited {timeout:g} s for {processes} processes; missing: "
                f"{', '.join(map(str, sorted(missing)))}. Start them with the same --coordinator "
                "and --processes, each with its own --process_id"
            )
        for key, _ in waiting.select(left):
            connection = key.fileobj
            if connection is server:
                with contextlib.suppress(OSError):
                    accepted = stack.enter_context(server.accept()[0])
                    accepted.setblocking(False)
                    waiting.register(accepted, selectors.EVENT_READ)
                    said[accepted] = b""
                continue
            try:
                piece = connection.recv(_GREETING)
            except OSError:
                piece = b""
            said[connection] += piece
            whole = said[connection].endswith(b"\n")
            if piece and not whole and len(said[connection]) < _GREETING:
                continue
            waiting.unregister(connection)
            if not re.fullmatch(rb"\d+\n", said[connection]):  # no process of ours
                connection.close()
                continue
            number = int(said[connection])
            callers.append(connection)
            if number not in missing:
                return callers, (
                    f"process_id {number} came twice, or is not one of {processes} processes"
                )
            missing.remove(number)
    return callers, ""


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
                error = json.loads(_read_line(connection, deadline + 2 * _GRACE_SECONDS))
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)
            continue
        if error:
            raise ProcessesMissing(error)
        return


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = connection.recv(1024)
        if not piece or len(line) > _ANSWER:
            raise ConnectionError("no whole line")
        line += piece
    return line
