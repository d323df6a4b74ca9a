"""A server of vLLM in a process of its own, on loopback, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

START = 300  # seconds that a start may take


class LocalServer:
    """A server on a free port of loopback; it runs inside `with`.

    Args:
        command: Command line that starts it, without host and port.
        log: File for what it prints.
        environment: Changes to the environment variables; `None` removes one.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str | None]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        variables = {**os.environ, **environment}
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(  # noqa: S603  # our own command
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                env={name: value for name, value in variables.items() if value is not None},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            self.wait()
        except BaseException:  # an interrupt, too, must leave no server behind
            self.stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: It has ended, or takes too long.
        """
        until = time.monotonic() + START
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise RuntimeError(f"The server did not start:\n{self.printed()[-20000:]}")

    def stop(self) -> None:
        """End the server and its engine."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):  # its engine, if that is left
            os.killpg(self.process.pid, signal.SIGKILL)

    def printed(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(encoding="utf-8")

    def get(self, path: str) -> str:
        """Return the body of a GET request."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        """Return the sum of a Prometheus metric over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def open(self, path: str, body: Mapping[str, Any] | bytes) -> Any:
        """Return the open response to a POST request of JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        return urllib.request.urlopen(request, timeout=600)  # noqa: S310  # http

    def post(self, path: str, body: Mapping[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON of the response to a POST request."""
        try:
            with self.open(path, body) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed response, with usage in the last one."""
        with self.open(path, {**body, "stream": True, "stream_options": {"include_usage": True}}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))
