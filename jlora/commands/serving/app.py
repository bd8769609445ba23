# SPDX-License-Identifier: Apache-2.0
"""The HTTP side of a server: routes, limits, streams, clients that go away."""

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import (
  JSONResponse,
  PlainTextResponse,
  Response,
  StreamingResponse,
)
from starlette.routing import Route

from jlora.commands.serving.adapters import Adapters
from jlora.commands.serving.batching import Batcher, Job, Said
from jlora.commands.serving.completions import (
  Answer,
  Limits,
  Wanted,
  choice_of,
  head_of,
  read_completion,
  read_load,
  read_unload,
  usage_of,
)
from jlora.commands.serving.refusals import Refused
from jlora.commands.serving.text import Transcript


class Service(NamedTuple):
  """What answers requests.

  Attributes:
    tokenizer: None if prompts must be token ids.
    ends: tokens that end texts.
    body: bytes of a request, at most.
    timeout: seconds that a request may take.
    hosts: names that requests may call the server by; ("*",) for any.
    compilations: counts those since the server began to serve.
  """

  batcher: Batcher
  adapters: Adapters
  tokenizer: Any
  ends: frozenset[int]
  limits: Limits
  body: int
  timeout: float
  hosts: tuple[str, ...]
  compilations: Callable[[], int]


Handler = Callable[[Service, Request], Awaitable[Response]]


def build_app(service: Service) -> Starlette:
  """Makes the ASGI application.

  Args:
    service: what answers.

  Returns:
    An application, without a life span of its own.
  """
  routes = [
    Route(path, _guarded(service, handler), methods=[method])
    for method, path, handler in (
      ("GET", "/health", _health),
      ("GET", "/v1/models", _models),
      ("POST", "/v1/completions", _complete),
      ("POST", "/v1/load_lora_adapter", _load),
      ("POST", "/v1/unload_lora_adapter", _unload),
    )
  ]
  hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=service.hosts)]
  return Starlette(routes=routes, middleware=hosts)


def _guarded(service: Service, handler: Handler):
  """Returns an endpoint of which a refusal is an answer."""

  async def endpoint(request: Request) -> Response:
    """Answers a request."""
    try:
      return await handler(service, request)
    except Refused as error:
      wait = {"Retry-After": "1"} if error.status == 503 else None
      return JSONResponse(error.body(), error.status, headers=wait)

  return endpoint


async def _body(service: Service, request: Request) -> bytes:
  """Reads a request's body, up to the limits of bytes and seconds."""
  kind = request.headers.get("content-type", "")
  if kind.partition(";")[0].strip() != "application/json":
    raise Refused(415, "not_json", f"Content-Type is {kind!r}; send JSON.")
  found = bytearray()
  try:
    async with asyncio.timeout(service.timeout):
      async for part in request.stream():
        found += part
        if len(found) > service.body:
          raise Refused(
            413,
            "too_large",
            f"The request has more than {service.body:,} bytes; send less.",
          )
  except TimeoutError as error:
    raise Refused(
      408, "timeout", "The request did not come in time."
    ) from error
  return bytes(found)


async def _health(service: Service, request: Request) -> Response:
  """Tells how busy the server is, and what it has cost."""
  del request
  return JSONResponse(
    {
      "status": "ok",
      **service.batcher.counts,
      "in_slots": service.adapters.room.names,
      "compilations": service.compilations(),
      "processor_seconds": time.process_time(),
    }
  )


async def _models(service: Service, request: Request) -> Response:
  """Lists the base and its adapters."""
  del request
  base = service.adapters.base_name
  common = {"object": "model", "created": int(time.time()), "owned_by": "jlora"}
  found: list[dict[str, Any]] = [{"id": base, **common}]
  found += [
    {"id": name, **common, "parent": base, "root": str(folder)}
    for name, folder in sorted(service.adapters.folders.items())
  ]
  return JSONResponse({"object": "list", "data": found})


async def _load(service: Service, request: Request) -> Response:
  """Makes an adapter known."""
  name, folder, in_place = read_load(await _body(service, request))
  await asyncio.to_thread(
    service.adapters.load, name, folder, in_place=in_place
  )
  return PlainTextResponse(f"Success: {name} is loaded.")


async def _unload(service: Service, request: Request) -> Response:
  """Forgets an adapter."""
  name = read_unload(await _body(service, request))
  await asyncio.to_thread(service.adapters.unload, name)
  return PlainTextResponse(f"Success: {name} is unloaded.")


async def _complete(service: Service, request: Request) -> Response:
  """Answers with completions, whole or as a stream."""
  wanted = read_completion(
    await _body(service, request),
    service.limits,
    service.batcher.decoder.sizes,
    service.tokenizer,
  )
  adapter = None if wanted.model == service.adapters.base_name else wanted.model
  if adapter is not None:
    service.adapters.check(adapter)
  pieces = _pieces(service, wanted, adapter)
  if not wanted.is_stream:
    return await _unless_gone(request, _whole(wanted, pieces))
  # Nothing is sent before something was said, so that errors have a status.
  first = await _unless_gone(request, anext(pieces))
  return StreamingResponse(
    _stream(wanted, first, pieces), media_type="text/event-stream"
  )


async def _pieces(
  service: Service, wanted: Wanted, adapter: str | None
) -> AsyncIterator[Answer]:
  """Submits a request's texts; yields the pieces of their answers.

  However it ends, by an error, in time or because nobody listens, its jobs end.
  """
  heard: asyncio.Queue[tuple[int, Said]] = asyncio.Queue()
  loop = asyncio.get_running_loop()

  def tell(index: int, said: Said) -> None:
    """Hands a text's words over from the batcher's thread."""
    if not loop.is_closed():
      loop.call_soon_threadsafe(heard.put_nowait, (index, said))

  jobs = _jobs(service, wanted, adapter, tell)
  scripts = [Transcript(service.tokenizer, wanted.stops) for _ in jobs]
  open_ = set(range(len(jobs)))
  deadline = loop.time() + service.timeout
  try:
    service.batcher.submit(jobs)
    while open_:
      left = deadline - loop.time()
      index, said = await asyncio.wait_for(heard.get(), left)
      if said.error is not None:
        raise said.error
      if index not in open_:  # it was stopped by its text
        continue
      script = scripts[index]
      text = script.add(said.tokens, is_last=said.end is not None)
      end = "stop" if script.is_stopped else said.end
      if end is not None:
        open_.discard(index)
        service.batcher.cancel([jobs[index]])
      yield Answer(index, text, list(said.tokens), end)
  except TimeoutError as error:
    raise Refused(
      504, "timeout", f"There was no answer within {service.timeout:g} seconds."
    ) from error
  finally:
    service.batcher.cancel(jobs)


def _jobs(
  service: Service,
  wanted: Wanted,
  adapter: str | None,
  tell: Callable[[int, Said], None],
) -> list[Job]:
  """Makes a job for each text of a request."""
  ends = frozenset() if wanted.ignores_ends else service.ends
  return [
    Job(
      tokens,
      adapter,
      wanted.limit,
      wanted.temperature,
      seed,
      ends,
      functools.partial(tell, i),
    )
    for i, (tokens, seed) in enumerate(
      zip(wanted.prompts, wanted.seeds, strict=True)
    )
  ]


async def _whole(wanted: Wanted, pieces: AsyncIterator[Answer]) -> Response:
  """Answers when all texts are complete."""
  found = [Answer(i, "", [], None) for i in range(len(wanted.prompts))]
  async with contextlib.aclosing(pieces):  # pyright: ignore
    async for piece in pieces:
      was = found[piece.index]
      text, tokens = was.text + piece.text, was.tokens + piece.tokens
      found[piece.index] = Answer(piece.index, text, tokens, piece.end)
  choices = [choice_of(answer, wanted, is_whole=True) for answer in found]
  said = sum(len(answer.tokens) for answer in found)
  usage = usage_of(wanted, said)
  return JSONResponse(
    {**head_of(wanted.model), "choices": choices, "usage": usage}
  )


async def _stream(
  wanted: Wanted, first: Answer, pieces: AsyncIterator[Answer]
) -> AsyncIterator[str]:
  """Yields an answer as server-sent events."""
  head, said = head_of(wanted.model), 0
  piece: Answer | None = first
  try:
    while piece is not None:
      said += len(piece.tokens)
      choice = choice_of(piece, wanted, is_whole=False)
      yield _event({**head, "choices": [choice]})
      piece = await anext(pieces, None)
  except Refused as error:
    yield _event(error.body())
    return
  finally:
    await pieces.aclose()  # pyright: ignore
  if wanted.counts_usage:
    yield _event({**head, "choices": [], "usage": usage_of(wanted, said)})
  yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
  """Formats a server-sent event."""
  return f"data: {json.dumps(content)}\n\n"


async def _unless_gone(request: Request, work: Any) -> Any:
  """Waits for work, and ends it when the client has gone away."""
  task = asyncio.ensure_future(work)
  gone = asyncio.ensure_future(_gone(request))
  try:
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
      return task.result()
    raise Refused(499, "gone", "The client has gone away.")
  finally:
    gone.cancel()
    if not task.done():
      task.cancel()
      await asyncio.wait({task})


async def _gone(request: Request) -> None:
  """Returns when a client has closed its connection."""
  while (await request.receive())["type"] != "http.disconnect":
    pass
