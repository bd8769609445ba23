# SPDX-License-Identifier: Apache-2.0
"""`jlora serve` in a process of its own, and clients that ask it at once."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai

_START = 600  # seconds; compiling on a busy machine takes minutes
_EXACT = {"ignore_eos": True, "return_token_ids": True}


class Asked(NamedTuple):
  """A request for the most likely tokens.

  Attributes:
    model: an adapter's name, or the base's.
    prompt: token ids.
    count: tokens to be said.
    leaves: whether the client goes away after the first ones.
  """

  model: str
  prompt: tuple[int, ...]
  count: int
  leaves: bool = False


class Answered(NamedTuple):
  """What a request got.

  Attributes:
    tokens: that were said; None after an error.
    error: what the server said of it, "" for none.
    seconds: until the last token.
  """

  tokens: list[int] | None
  error: str
  seconds: float


class Server(NamedTuple):
  """A running server.

  Attributes:
    url: of its API.
  """

  url: str
  process: subprocess.Popen

  def health(self) -> dict[str, Any]:
    """Returns what `/health` tells."""
    with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health") as x:
      return json.load(x)

  def stop(self) -> int:
    """Sends SIGTERM; returns the exit code."""
    self.process.send_signal(signal.SIGTERM)
    return self.process.wait(_START)


@contextlib.contextmanager
def serving(base: Path, adapters: Path, *words: str) -> Iterator[Server]:
  """Runs `jlora serve` until the end of a block.

  Args:
    base: a model's folder.
    adapters: a folder of PEFT folders.
    words: further flags.

  Yields:
    Server, once it answers.

  Raises:
    RuntimeError: it ended before that; shows what it said.
  """
  command = [sys.executable, "-m", "jlora.commands.serve", "--port=0"]
  command += [f"--base={base}", f"--adapters={adapters}", *words]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    said: list[str] = []
    for line in process.stdout or ():
      said.append(line)
      if line.startswith("serving: "):
        break
    else:
      raise RuntimeError(f"{' '.join(command)} ended: {''.join(said)}")
    yield Server(said[-1].split()[-1], process)
  finally:
    process.kill()
    process.wait()
    if process.stdout:
      process.stdout.close()


def ask_all(
  server: Server,
  asked: Sequence[Asked],
  clients: int,
  meanwhile: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
  """Asks with many clients at once, each one request after the other.

  Args:
    server: that is asked.
    asked: requests, in the order in which clients take them.
    clients: as many connections.
    meanwhile: called with the number of answers after each of them.

  Returns:
    What each request got, in the order of `asked`.
  """
  return asyncio.run(_ask_all(server, asked, clients, meanwhile))


async def _ask_all(server, asked, clients, meanwhile) -> list[Answered]:
  """Runs the clients."""
  found: list[Answered] = [Answered(None, "never asked", 0.0)] * len(asked)
  todo = iter(enumerate(asked))
  done = 0

  async def work() -> None:
    """Asks until nothing is left."""
    nonlocal done
    async with openai.AsyncOpenAI(
      base_url=server.url, api_key="none", max_retries=0, timeout=_START
    ) as client:
      for i, one in todo:
        found[i] = await _ask(client, one)
        done += 1
        meanwhile(done)

  await asyncio.gather(*(work() for _ in range(clients)))
  return found


async def _ask(client: openai.AsyncOpenAI, asked: Asked) -> Answered:
  """Asks once; an error is an answer, too."""
  clock = asyncio.get_running_loop().time
  began = clock()
  given: dict[str, Any] = {
    "model": asked.model,
    "prompt": list(asked.prompt),
    "max_tokens": asked.count,
    "temperature": 0.0,
    "extra_body": _EXACT,
  }
  try:
    if asked.leaves:
      stream = await client.completions.create(stream=True, **given)
      tokens: list[int] = []
      async for part in stream:
        tokens += getattr(part.choices[0], "token_ids", [])
        break
      await stream.close()
    else:
      answer = await client.completions.create(**given)
      tokens = getattr(answer.choices[0], "token_ids", [])
  except openai.OpenAIError as error:
    return Answered(None, f"{type(error).__name__}: {error}", clock() - began)
  return Answered(tokens, "", clock() - began)
