"""Who is missing has a name, in every process that waits."""

import pathlib
import socket
import sys
import threading
import time
from contextlib import suppress

import pytest

from orthojax.errors import ConfigError, UserError
from orthojax.parallel import processes
from orthojax.parallel.processes import initialize
from orthojax.parallel.rendezvous import ProcessesMissing, await_processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def call_all(numbers, processes, timeout):
    """Calls the roll in a thread for each of `numbers`; what each raised, or None."""
    port, outcomes = free_port(), {}

    def call(key, number):
        try:
            await_processes(f"localhost:{port}", processes, number, timeout)
            outcomes[key] = None
        except UserError as error:
            outcomes[key] = error
        except ProcessesMissing as error:
            outcomes[key] = error

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(numbers)]
    for thread in reversed(threads):  # process 0 last: the others have to wait for it
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    with socket.create_server(("", port)):  # JAX's own service can listen there at once
        return [outcomes[key] for key in range(len(numbers))]


def test_everybody_is_there():
    assert call_all(range(5), 5, 20.0) == [None] * 5


def test_the_missing_are_named_to_all_who_wait():
    outcomes = call_all([0, 2, 4], 6, 1.0)
    for outcome in outcomes:
        assert isinstance(outcome, ProcessesMissing)
        assert "waited 1 s for 6 processes; missing: 1, 3, 5." in str(outcome)


def test_without_process_0_the_others_name_it():
    [outcome] = call_all([3], 4, 0.5)
    assert "process 3 waited 0.5 s for process 0 at localhost:" in str(outcome)


def test_a_number_given_twice_is_named():
    outcomes = call_all([0, 1, 1], 3, 5.0)
    for outcome in outcomes:
        assert "process_id 1 came twice" in str(outcome)


def test_strangers_and_silent_callers_do_not_count():
    port, outcome = free_port(), []
    server = threading.Thread(
        target=lambda: outcome.append(await_processes(f"localhost:{port}", 2, 0, 20.0))
    )
    server.start()
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b""):
        while True:
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(greeting)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    assert server.is_alive()
    await_processes(f"localhost:{port}", 2, 1, 20.0)
    server.join()
    assert outcome == [None]


def _listening(port):
    """The addresses that this machine listens on at a port, as /proc has them."""
    lines = []
    for name in ("tcp", "tcp6"):
        file = pathlib.Path("/proc/net", name)
        lines += file.read_text().splitlines()[1:] if file.exists() else []
    fields = [line.split() for line in lines]
    return {place[:-5] for _, place, _, state, *_ in fields if state == "0A" and place[-4:] == port}


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/net")
@pytest.mark.parametrize(
    ("host", "alone"), [("localhost", True), ("LOCALHOST.", True), ("127.0.0.1", True), ("", False)]
)
def test_a_coordinator_on_localhost_listens_to_this_machine_alone(host, alone):
    port = free_port()
    host = host or socket.gethostname()
    server = threading.Thread(target=await_processes, args=(f"{host}:{port}", 2, 0, 20.0))
    server.start()
    while not (found := _listening(f"{port:04X}")):
        time.sleep(0.02)
    await_processes(f"localhost:{port}", 2, 1, 20.0)
    server.join()
    assert found == {"0100007F"} if alone else not found & {"0100007F"}
    assert processes._bind_address(f"{host}:{port}") == (f"127.0.0.1:{port}" if alone else None)


def test_nobody_who_is_slow_keeps_others_waiting_or_outlasts_the_timeout():
    port, slow = free_port(), threading.Event()
    outcome = []

    def drip(piece):
        with socket.create_connection(("localhost", port)) as connection, suppress(OSError):
            while not slow.wait(0.05):
                connection.sendall(piece)

    def preside():
        start = time.monotonic()
        with pytest.raises(ProcessesMissing, match="missing: 2"):
            await_processes(f"localhost:{port}", 3, 0, 1.5)
        outcome.append(time.monotonic() - start)

    server = threading.Thread(target=preside)
    server.start()
    time.sleep(0.1)
    strangers = [
        threading.Thread(target=drip, args=(piece,)) for piece in (b"", b"1", b"GET /\r\n")
    ]
    for stranger in strangers:
        stranger.start()
    with pytest.raises(ProcessesMissing, match="missing: 2"):  # 1 was heard
        await_processes(f"localhost:{port}", 3, 1, 10.0)
    server.join()
    slow.set()
    for stranger in strangers:
        stranger.join()
    assert outcome[0] < 3


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="belong together"):
        initialize("localhost:1234")
    with pytest.raises(ConfigError, match="process_id is 2; it must be from 0 to 1"):
        initialize("localhost:1234", 2, 2)
    with pytest.raises(UserError, match="'localhost'; it must be HOST:PORT"):
        await_processes("localhost", 2, 0, 1.0)
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(UserError, match="cannot listen on port .*choose another port"),
    ):
        await_processes(f"localhost:{taken.getsockname()[1]}", 2, 0, 1.0)


def test_nobody_to_detect_is_said(monkeypatch):
    for name in ("SLURM_JOB_ID", "TPU_WORKER_HOSTNAMES", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="neither Cloud TPU, nor Slurm, nor Kubernetes"):
        initialize()
