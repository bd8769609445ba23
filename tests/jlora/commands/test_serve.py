# SPDX-License-Identifier: Apache-2.0
"""`jlora serve` as clients see it: many adapters, limits, mishaps, the end."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

import jlora
from jlora import models
from jlora.checkpoints import write_safetensors
from jlora.commands import entry, serve
from jlora.commands.serving.decoding import count_compilations
from tests.helpers import served

ROOT = pathlib.Path(__file__).parents[3]
COUNT = 12
EXACT = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """The folders of a base and twelve adapters; parameters of both."""
  folder = tmp_path_factory.mktemp("served")
  served.write_base(folder / "base")
  model, params = models.load(folder / "base")
  loras = served.write_adapters(folder / "adapters", params, COUNT)
  return folder, model, params, loras


@pytest.fixture(scope="module")
def server(work):
  folder, *_ = work
  with served.running(folder / "base", folder / "adapters", room=3) as found:
    yield found


@pytest.fixture
def own(work, tmp_path):
  """A folder of three adapters that a test may spoil; starts servers."""
  folder, *_ = work
  for name in ("a0", "a1", "a2"):
    shutil.copytree(folder / "adapters" / name, tmp_path / "adapters" / name)

  @contextlib.contextmanager
  def start(**options):
    with served.running(folder / "base", tmp_path / "adapters", **options) as s:
      yield s

  start.folder = tmp_path / "adapters"
  return start


def ask(client, model, prompt, count=6, **options):
  """Asks for the most likely tokens, or by a seed."""
  given = {"temperature": 0.0, "extra_body": EXACT, **options}
  return client.completions.create(
    model=model, prompt=prompt, max_tokens=count, **given
  )


def tokens_of(answer):
  return [choice.token_ids for choice in answer.choices]


def health(server):
  with urllib.request.urlopen(server.url[:-3] + "/health") as found:
    return json.load(found)


def wait_until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def busy(server):
  """(texts that are continued, texts that wait)."""
  found = health(server)
  return found["running"], found["waiting"]


def refusal(call, *args, **kwargs):
  """(status, code, message) with which the server refuses a call."""
  with pytest.raises(openai.APIStatusError) as caught:
    call(*args, **kwargs)
  error = caught.value
  return error.status_code, error.code, error.message


def draw_prompts(count, seed=0):
  rng = np.random.default_rng(seed)
  return [
    rng.integers(0, served.VOCABULARY, rng.integers(1, 21)).tolist()
    for _ in range(count)
  ]


def apart(work, name, prompts, count):
  """What the model says with one adapter summed into its weights.

  All calls are of one shape, that of 5 prompts and 20 tokens: one program.
  """
  _, model, params, loras = work
  if name != "base":
    params = jlora.apply(params, jax.tree.map(jnp.asarray, loras[name]))
  lengths, padded = np.ones(5, np.int32), np.zeros((5, 20), np.int32)
  for row, prompt in enumerate(prompts):
    lengths[row], padded[row, : len(prompt)] = len(prompt), prompt
  said = models.generate(
    model, params, jnp.asarray(padded), 20, lengths=jnp.asarray(lengths)
  )
  return np.asarray(said)[: len(prompts), :count].tolist()


class Gate:
  """Lets a decoder's turns pass, or stops them."""

  def __init__(self, server, monkeypatch):
    decoder = server.service.batcher.decoder
    self.is_open, say = threading.Event(), decoder.say
    self.is_open.set()
    self.calls = 0

    def gated(*args):
      self.calls += 1
      assert self.is_open.wait(60)
      return say(*args)

    monkeypatch.setattr(decoder, "say", gated)


def test_every_answer_is_that_of_its_adapter_alone(work, server):
  """12 adapters and the base, 3 slots, 4 rows, 6 clients, 65 requests."""
  names = [*work[3], "base"]
  prompts = draw_prompts(5)
  asked = [(name, i) for name in names for i in range(5)]
  order = np.random.default_rng(1).permutation(len(asked))
  with (
    concurrent.futures.ThreadPoolExecutor(6) as clients,
    server.client() as c,
  ):
    said = clients.map(
      lambda at: tokens_of(ask(c, asked[at][0], prompts[asked[at][1]]))[0],
      order,
    )
    found = {asked[at]: x for at, x in zip(order, said, strict=True)}
  assert health(server)["compilations"] == 0
  assert len(health(server)["in_slots"]) == 3
  for name in names:
    wanted = apart(work, name, prompts, 6)
    assert [found[name, i] for i in range(5)] == wanted
  every = {
    tuple(map(tuple, (found[name, i] for i in range(5)))) for name in names
  }
  assert len(every) == len(names)  # or a wrong adapter would not be seen


def test_chance_depends_on_the_seed_alone(server):
  prompt = draw_prompts(1, seed=3)[0]
  with server.client() as client:
    hot = {"temperature": 1.5, "seed": 11}
    alone = tokens_of(ask(client, "a3", prompt, 9, **hot))
    crowd = tokens_of(
      ask(client, "a3", [[1, 2], prompt, prompt], 9, **hot | {"seed": 10})
    )
    assert crowd[1:2] == alone  # seeds of prompts count up
    assert crowd[2] != alone[0]
    assert tokens_of(ask(client, "a3", prompt, 9, **hot)) == alone
    greedy = tokens_of(ask(client, "a3", prompt, 9))
    assert greedy != alone
    assert tokens_of(ask(client, "a3", prompt, 9, temperature=1e-6)) == greedy
    drawn = {
      str(tokens_of(ask(client, "a3", prompt, 9, temperature=1.5)))
      for _ in range(3)
    }
    assert len(drawn) == 3


def test_texts_streams_stops_and_ends(work, server):
  said = apart(work, "a1", [[1, 2, 3]], 8)[0]
  words = [served.WORDS[i] for i in said]
  with server.client() as client:
    whole = ask(client, "a1", "w1 w2 w3", 8)
    assert whole.choices[0].text == " ".join(words)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].prompt_token_ids == [1, 2, 3]
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 8)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = ask(client, "a1", "w1 w2 w3", 8, **options)
    assert "".join(p.choices[0].text for p in parts) == " ".join(words)
    assert sum((p.choices[0].token_ids for p in parts), []) == said
    assert [p.choices[0].finish_reason for p in parts][-1] == "length"
    assert len(parts) > 2
    assert last.usage.completion_tokens == 8
    at = next(i for i in range(2, 8) if words[i] not in words[:i])
    stopped = ask(client, "a1", "w1 w2 w3", 8, stop=[f" {words[at]}", "zz"])
    assert stopped.choices[0].text == " ".join(words[:at])
    assert stopped.choices[0].finish_reason == "stop"
  wait_until(lambda: busy(server) == (0, 0))


def test_a_text_is_over_at_the_models_end(work, server):
  """At the base's eos_token_id, which is not part of the text."""
  prompts = draw_prompts(5, seed=5)
  whole = apart(work, "a1", prompts, 20)
  with server.client() as client:
    exact = {"return_token_ids": True}
    found = ask(client, "a1", prompts, 20, extra_body=exact)
  ended = [served.END in said for said in whole]
  assert any(ended)
  for choice, said, end in zip(found.choices, whole, ended, strict=True):
    assert choice.finish_reason == ("stop" if end else "length")
    assert choice.token_ids == said[: said.index(served.END)] if end else said


def test_the_models_are_listed(server):
  with server.client() as client:
    found = {x.id: x for x in client.models.list()}
  assert set(found) == {"base", *(f"a{i}" for i in range(COUNT))}
  assert found["a3"].parent == "base"


def test_nothing_of_the_extra_is_loaded_until_something_is_served():
  code = (
    "import sys, jlora.adapting, jlora.commands.serve; "
    "print(*{'starlette', 'uvicorn', 'tokenizers'} & sys.modules.keys())"
  )
  found = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert found.stdout == "\n", found.stderr


def command(capsys, *words):
  """The command in this process: its exit code, and the error it told."""
  return entry.run(serve.COMMAND, words), capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  code, said = command(capsys, "--base=x", "--adapters=y")
  assert code == 1
  assert said == (
    "error: `jlora serve` needs uvicorn: pip install 'jlora[serve]'\n"
  )


def test_mistakes_are_told_before_anything_is_served(work, tmp_path, capsys):
  base, own = f"--base={work[0]}/base", f"--adapters={work[0]}/adapters"
  rest = ("--port=0", f"--cache={tmp_path}")
  taken = socket.create_server(("127.0.0.1", 0))
  port = taken.getsockname()[1]
  with contextlib.closing(taken):
    for words, says in (
      ((base, own, f"--port={port}"), f"127.0.0.1:{port} cannot be listened o"),
      ((base, own, "a"), "only flags are taken, got a"),
      ((f"--base={tmp_path}", own, *rest), "holds neither safetensors"),
      ((base, "--adapters=/nowhere", *rest), "/nowhere is no folder; give one"),
      (
        (base, own, *rest, "--rank=2", "--modules=("),
        "--modules=( is no regex",
      ),
      ((base, own, *rest, "--modules=x"), "--modules=x finds none of head/ker"),
      ((base, own, *rest, "--length=32"), "length above 32"),
    ):
      code, said = command(capsys, *words)
      assert (code, says in said) == (1, True), said
      assert said.count("\n") == 1


REFUSED = (
  (dict(model="a99"), 404, "model_not_found", "no model a99; did you mean a"),
  (dict(prompt=[60]), 400, "too_long", "token id 60, at most 59"),
  (dict(prompt=[]), 400, "too_long", "a prompt without tokens"),
  (dict(prompt=[1] * 25), 400, "too_long", "tokens of a prompt 25, at most 24"),
  (dict(prompt=[[1]] * 9), 400, "too_long", "prompts 9, at most 8"),
  (dict(max_tokens=33), 400, "too_long", "max_tokens 33, at most 32"),
  (dict(prompt=[1] * 24, max_tokens=26), 400, "too_long", "answer 49, at most"),
  (
    dict(max_tokens=0),
    400,
    "bad_request",
    "max_tokens is 0, needed is an inte",
  ),
  (dict(temperature=-1.0), 400, "bad_request", "temperature is -1.0, needed"),
  (dict(n=2, top_p=0.5), 400, "not_supported", "2 fields .*: n, top_p; leave"),
  (dict(extra_body={"min_p": 1}), 400, "not_supported", "1 fields .*: min_p;"),
  (dict(stop=["a"] * 5), 400, "bad_request", "stop has 5 texts; needed are up"),
)


@pytest.mark.parametrize(("given", "status", "code", "words"), REFUSED)
def test_what_is_not_served_is_refused(server, given, status, code, words):
  options = {"model": "a1", "prompt": [1], "max_tokens": 25, **given}
  with server.client() as client:
    found = refusal(client.completions.create, **options)
  assert found[:2] == (status, code)
  assert re.search(words, found[2]), found[2]


def test_neutral_values_of_what_is_not_supported_are_taken(server):
  with server.client() as client:
    given = {"n": 1, "top_p": 1, "echo": False, "logit_bias": {}, "user": "me"}
    assert ask(client, "a1", [1], **given).usage.total_tokens == 7


def post(server, body, path="/v1/completions", **headers):
  """A bare request: (status, text)."""
  host = server.url.split("/")[2]
  connection = http.client.HTTPConnection(host, timeout=60)
  headers = {"Content-Type": "application/json", **headers}
  with contextlib.closing(connection):
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.parametrize(
  ("body", "headers", "status", "words"),
  [
    (b"{", {}, 400, "the request is no JSON"),
    (b"\xff", {}, 400, "utf-8"),
    (b"[1]", {}, 400, "holds no object"),
    (b"{}", {}, 400, "model is missing, prompt is missing"),
    (b"[" * 5000, {}, 400, "levels"),
    (b" " * 70000, {}, 413, "more than 65,536 bytes"),
    (b"{}", {"Content-Type": "text/plain"}, 415, "send JSON"),
    (b"{}", {"Host": "evil.example"}, 400, "Invalid host"),
  ],
)
def test_damaged_requests(server, body, headers, status, words):
  found, text = post(server, body, **headers)
  assert found == status
  assert words in text
  assert health(server)["status"] == "ok"


def test_a_client_that_goes_away_leaves_nothing_behind(server, monkeypatch):
  room, gate = server.service.adapters.room, Gate(server, monkeypatch)
  with server.client() as client:
    before = tokens_of(ask(client, "a5", [4, 2], 6))
    stream = ask(client, "a5", [4, 2], 32, stream=True)
    next(iter(stream))
    gate.is_open.clear()
    stream.close()
    body = json.dumps({"model": "a5", "prompt": [1], "max_tokens": 32})
    host, port = server.url.split("/")[2].split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as lines:
      for text in (head, head + body[:9].encode(), head + body.encode()):
        line = socket.create_connection((host, int(port)))
        lines.enter_context(line).sendall(text)
      # One is whole: it runs, while nothing is sent.
      wait_until(lambda: sum(busy(server)) >= 1)
    time.sleep(0.3)  # until the server has heard that they are gone
    calls = gate.calls
    gate.is_open.set()
    wait_until(lambda: busy(server) == (0, 0) and not +room._users)
    assert gate.calls <= calls + 2  # of ten that either would have taken
    assert tokens_of(ask(client, "a5", [4, 2], 6)) == before


def test_adapters_come_and_go_while_others_run(work, own):
  names = {i: f"a{i}" for i in range(COUNT)}
  source = work[0] / "adapters"
  with own() as server, server.client() as client:
    url = {"load": "/v1/load_lora_adapter", "unload": "/v1/unload_lora_adapter"}

    def load(name, folder, **more):
      given = {"lora_name": name, "lora_path": str(folder), **more}
      return post(server, json.dumps(given), url["load"])

    def unload(name):
      return post(server, json.dumps({"lora_name": name}), url["unload"])

    shutil.copytree(source / names[9], own.folder / "later")
    assert refusal(ask, client, "new", [1])[:2] == (404, "model_not_found")
    assert load("new", "later") == (200, "Success: new is loaded.")
    wanted = {name: apart(work, name, [[1, 2]], 20)[0] for name in ("a9", "a8")}
    assert tokens_of(ask(client, "new", [1, 2], 20)) == [wanted["a9"]]
    for name, folder, words in (
      ("new", "later", "there is an adapter new; unload it, or say load_inp"),
      ("base", "later", "base is the base's name"),
      ("x", source / "a3", "does not lie in the folder of adapters"),
      ("x", "../adapters", "does not lie in the folder of adapters"),
      ("x/y", "later", "is no name for an adapter"),
      ("x", "nothing", "nothing does not exist"),
    ):
      status, text = load(name, folder)
      assert (status, words in text) == (400, True), text
    # Replaced while it runs: what runs ends as it began.
    stream = iter(ask(client, "new", [1, 2], 20, stream=True))
    first = next(stream)
    shutil.rmtree(own.folder / "later")
    shutil.copytree(source / names[8], own.folder / "later")
    assert load("new", "later", load_inplace=True)[0] == 200
    assert tokens_of(ask(client, "new", [1, 2], 20)) == [wanted["a8"]]
    parts = [first, *stream]
    assert sum((p.choices[0].token_ids for p in parts), []) == wanted["a9"]
    assert unload("new") == (200, "Success: new is unloaded.")
    assert unload("new")[0] == 404
    assert refusal(ask, client, "new", [1])[:2] == (404, "model_not_found")


def test_a_later_adapter_of_another_shape_compiles_nothing(work, own):
  """Of a rank that there was none of, in a server of three adapters."""
  shutil.rmtree(own.folder / "a2")  # the one of rank 3
  few = {
    path: lora
    for path, lora in served.draw_adapter(work[2], 3, 77).items()
    if "mlp" in path
  }
  served.write_adapter(own.folder / "few", work[2], few)
  few_there = own.folder / "few"
  few_there.rename(own.folder.parent / "few")
  with own() as server, server.client() as client:
    (own.folder.parent / "few").rename(few_there)
    compiled = count_compilations()
    given = {"lora_name": "few", "lora_path": "few"}
    path = "/v1/load_lora_adapter"
    assert post(server, json.dumps(given), path)[0] == 200
    said = tokens_of(ask(client, "few", [1, 2], 20))[0]
    assert compiled() == health(server)["compilations"] == 0
  params = jlora.apply(work[2], few)
  wanted = models.generate(work[1], params, jnp.array([[1, 2]]), 20)
  assert said == np.asarray(wanted)[0].tolist()


def spoil(folder, name, how):
  """Damages an adapter's folder in one way."""
  tensors = folder / name / "adapter_model.safetensors"
  if how == "cut":
    tensors.write_bytes(tensors.read_bytes()[:-40])
  elif how == "config":
    (folder / name / "adapter_config.json").write_text("{")
  elif how == "gone":
    shutil.rmtree(folder / name)
  else:
    found = dict(jlora.open_checkpoint(tensors))
    key = min(found)
    found[key] = np.full_like(found[key], np.nan)
    write_safetensors(tensors, found)


def test_a_damaged_folder_harms_no_other(own):
  shutil.copytree(own.folder / "a0", own.folder / "a3")
  spoil(own.folder, "a3", "cut")
  with own() as server, server.client() as client:
    before = tokens_of(ask(client, "a0", [3, 1], 6))
    assert {x.id for x in client.models.list()} == {"base", "a0", "a1", "a2"}
    found = refusal(ask, client, "a3", [1])
    assert found[:2] == (400, "damaged_adapter")
    assert "a3 is damaged" in found[2]
    for name, how, words in (
      ("a1", "config", "no JSON"),
      ("a1", "gone", "a1 does not exist"),
      ("a2", "nan", "not finite"),
    ):  # after the server has begun, and before they were asked for
      spoil(own.folder, name, how)
      found = refusal(ask, client, name, [1])
      assert found[:2] == (400, "damaged_adapter")
      assert words in found[2]
      assert tokens_of(ask(client, "a0", [3, 1], 6)) == before
    shutil.rmtree(own.folder / "a2")
    shutil.copytree(own.folder / "a0", own.folder / "a2")  # mended
    assert tokens_of(ask(client, "a2", [3, 1], 6)) == before


def test_a_full_room_and_a_full_queue_wait_or_say_so(work, own, monkeypatch):
  """Three slots: a3 waits for one of them, and the base passes it."""
  shutil.copytree(work[0] / "adapters" / "a3", own.folder / "a3")
  names = ("a0", "a1", "a2", "a3", "base")
  wanted = {name: apart(work, name, [[1, 2]], 9)[0] for name in names}
  with own(queue=4, timeout=3) as server, server.client() as client:
    batcher, gate = server.service.batcher, Gate(server, monkeypatch)
    seat, seated = batcher._seat, []

    def noted(job, lease):
      seated.append(job.adapter or "base")
      return seat(job, lease)

    def get(name):
      return tokens_of(ask(client, name, [1, 2], 9))[0]

    monkeypatch.setattr(batcher, "_seat", noted)
    gate.is_open.clear()
    with concurrent.futures.ThreadPoolExecutor(5) as clients:
      said = {}
      for count, name in enumerate(names):
        said[name] = clients.submit(get, name)
        wait_until(lambda n=count: sum(busy(server)) == n + 1)
      assert busy(server) == (1, 4)
      shelf = server.service.adapters._shelf  # filled in the background
      wait_until(lambda: sorted(shelf.names) == ["a0", "a1", "a2", "a3"])
      assert refusal(ask, client, "a0", [1])[:2] == (503, "queue_full")
      gate.is_open.set()
      assert {name: x.result() for name, x in said.items()} == wanted
    assert seated == ["a0", "a1", "a2", "base", "a3"]
    gate.is_open.clear()  # nothing is said any more: time runs out
    assert refusal(ask, client, "a0", [1], 9)[:2] == (504, "timeout")
    gate.is_open.set()
    wait_until(lambda: busy(server) == (0, 0))
    assert get("a1") == wanted["a1"]


def test_a_failed_program_is_told_to_all_and_ends_the_server(own, monkeypatch):
  with own() as server, server.client() as client:

    def fail(*_):
      raise RuntimeError("out of memory")

    monkeypatch.setattr(server.service.batcher.decoder, "say", fail)
    found = refusal(ask, client, "a0", [1])
    assert found[0] == 500
    assert "out of memory" in found[2]
    server.thread.join(60)
    assert isinstance(server.service.batcher.failure, RuntimeError)


def test_the_end_lets_what_runs_finish(work, own, monkeypatch):
  wanted = apart(work, "a0", [[1, 2]], 20)[0]
  with own() as server, server.client() as client:
    gate = Gate(server, monkeypatch)
    stream = iter(ask(client, "a0", [1, 2], 20, stream=True))
    first = next(stream)
    gate.is_open.clear()
    server.life.stop()
    wait_until(lambda: server.service.batcher._is_closed)
    # Its socket is closed a moment later.
    with pytest.raises(openai.APIError, match="shutting down|Connection error"):
      ask(server.client(), "a0", [1])
    gate.is_open.set()
    parts = [first, *stream]
    assert sum((p.choices[0].token_ids for p in parts), []) == wanted
    server.thread.join(60)
  assert server.service.batcher.failure is None


def test_what_is_not_done_when_the_grace_is_over_is_told(own, monkeypatch):
  with own(grace=0.2) as server, server.client() as client:
    gate = Gate(server, monkeypatch)
    stream = iter(ask(client, "a0", [1, 2], 20, stream=True))
    next(stream)
    gate.is_open.clear()
    server.life.stop()
    wait_until(lambda: server.service.batcher._is_over)
    gate.is_open.set()
    with pytest.raises(openai.APIError, match="The server is shutting down"):
      list(stream)


def test_sigterm_in_the_middle_of_an_answer(work, tmp_path):
  """The command itself: it says where, finishes the answer, and ends with 0."""
  folder, *_ = work
  command = [sys.executable, "-m", "jlora.commands.serve", "--port=0"]
  command += [f"--base={folder}/base", f"--adapters={folder}/adapters"]
  command += ["--rows=2", "--room=2", "--length=64", f"--cache={tmp_path}"]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env=environment
  )
  try:
    lines = []
    for line in process.stdout:
      lines.append(line)
      if line.startswith("serving: "):
        break
    assert lines[0].startswith("12 adapters; a room of 2 slots of rank 16 ")
    url = lines[-1].split()[-1]
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    stream = iter(ask(client, "a2", [5, 6, 7], 20, stream=True))
    parts = [next(stream)]
    process.send_signal(signal.SIGTERM)
    parts += stream
    said = sum((part.choices[0].token_ids for part in parts), [])
    assert said == apart(work, "a2", [[5, 6, 7]], 20)[0]
    assert process.wait(60) == 0
    assert process.stdout.read() == "stopped\n"
  finally:
    process.kill()
    process.stdout.close()
    process.wait()
