# SPDX-License-Identifier: Apache-2.0
"""A server's life: its socket, its signals, and an orderly end."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from jlora.commands.serving.app import Service, build_app

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bind(host: str, port: int) -> socket.socket:
  """Opens the socket that is listened on.

  Args:
    host: a name or an address of this machine.
    port: 0 for any that is free.

  Raises:
    ValueError: it cannot be had.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise ValueError(
      f"{host}:{port} cannot be listened on: {error.strerror or error}; give "
      "another --port, or 0 for any"
    ) from error


def hosts_of(host: str) -> tuple[str, ...]:
  """Returns the names by which a server may be called; ("*",) for any.

  One that listens on the loopback is called by its names alone, so that no page
  in a browser reaches it by a name of its own.

  Example:
    >>> hosts_of("0.0.0.0")
    ('*',)
  """
  return ("*",) if host not in _LOOPBACK else (*_LOOPBACK, "[::1]")


class _Server(uvicorn.Server):
  """A uvicorn server that leaves signals to `Life`."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Captures none."""
    yield


class Life:
  """A server from its start to its end.

  Args:
    service: what answers; its batcher has been started.
    listening: a socket.
    grace: seconds that running requests have when it is stopped.
  """

  def __init__(self, service: Service, listening: socket.socket, grace: float):
    self._service, self._socket, self._grace = service, listening, grace
    config = uvicorn.Config(
      build_app(service),
      lifespan="off",
      log_level="warning",
      access_log=False,
      server_header=False,
      timeout_keep_alive=30,
      # A client that never ends its request does not hold up the end.
      timeout_graceful_shutdown=int(grace) + 2,
    )
    self._server = _Server(config)
    self._loop: asyncio.AbstractEventLoop | None = None
    self._is_stopping = False

  async def serve(self, ready: Callable[[], None] = lambda: None) -> None:
    """Serves until it is stopped.

    Args:
      ready: called when connections are taken.
    """
    self._loop = loop = asyncio.get_running_loop()
    batcher = self._service.batcher
    batcher.when_over(self.stop)
    # The socket listens already: who connects from now on is answered.
    loop.call_soon(ready)
    try:
      await self._server.serve(sockets=[self._socket])
    finally:
      await asyncio.to_thread(batcher.stop)
      self._service.adapters.close()

  def watch_signals(self) -> None:
    """Stops in good order at the first SIGTERM or SIGINT, at once later."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
      loop.add_signal_handler(number, self._stop)

  def stop(self) -> None:
    """Begins the end, from any thread."""
    if self._loop is not None and not self._loop.is_closed():
      self._loop.call_soon_threadsafe(self._stop)

  def _stop(self) -> None:
    """Takes nothing more; lets what runs finish, until the grace is over."""
    batcher, loop = self._service.batcher, asyncio.get_running_loop()
    self._server.should_exit = True
    batcher.close()
    wait = 0.0 if self._is_stopping else self._grace
    self._is_stopping = True
    loop.call_later(wait, batcher.halt)
