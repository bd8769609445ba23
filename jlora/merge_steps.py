# SPDX-License-Identifier: Apache-2.0
"""One tensor of a merge at a time: its inputs read, its method run."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.deltas import is_floating
from jlora.merge_jobs import Job, Source
from jlora.merging.averages import passthrough
from jlora.merging.task_vectors import ties
from jlora.merging.thresholds import count_of
from jlora.pairs import Part, read
from jlora.paths import key_for

# XLA's library of fused kernels takes a second for a million entries of a sum
# over a short leading axis; its own loops take two milliseconds.
_PLAIN = {"xla_cpu_experimental_ynn_fusion_type": ""}
_ONE = (("weights", (1.0,)),)


class Merger:
  """Makes tensors of a merge; safe to call from several threads.

  Programs are compiled once for each shape. Numbers are their arguments, so
  that gradients over layers compile nothing more.

  Args:
    method: `(stack, weights, base, *, key, **settings) -> array`.
    models: name -> checkpoint.
    key: PRNG key; each tensor uses its own, from its name.

  Example:
    >>> from jlora.merging.averages import linear
    >>> from jlora.pairs import Part
    >>> sources = (Source("a", Part("w")), Source("b", Part("w")))
    >>> job = Job("w", (2,), np.dtype(np.float32), sources, None,
    ...           (("weights", (1.0, 3.0)),))
    >>> left, right = np.float32([0, 4]), np.float32([4, 0])
    >>> Merger(linear, {"a": {"w": left}, "b": {"w": right}}, None)(job)
    array([3., 1.], dtype=float32)
  """

  def __init__(
    self,
    method: Callable[..., Any],
    models: Mapping[str, Any],
    key: jax.Array | None,
  ):
    self._method, self._models, self._key = method, models, key
    self._plain = getattr(method, "func", method)
    self._defaults = getattr(method, "keywords", {})
    self._compiled: dict[Any, Any] = {}
    self._lock = threading.Lock()
    self._locks: dict[Any, threading.Lock] = {}
    self._options = compiler_options()

  def __call__(self, job: Job) -> np.ndarray:
    """The tensor.

    Args:
      job: what it is made of.

    Returns:
      The array, in the job's shape and dtype.

    Raises:
      ValueError: the method's, or tensors that are not floating and differ;
        with the tensor's name.
    """
    leaves = [self._read(job, source) for source in job.sources]
    if job.settings is None or self._is_copy(job):
      return leaves[0].astype(job.dtype, copy=False)
    if not is_floating(leaves[0].dtype):
      if all(np.array_equal(leaves[0], other) for other in leaves):
        return leaves[0]
      raise ValueError(f"{job.name}: not floating, and models differ.")
    base = None if job.base is None else self._read(job, job.base)
    numbers = {
      name: np.asarray(value, np.float32) for name, value in job.settings or ()
    }
    if base is not None and self._is_trimmed:
      numbers["threshold"] = self._thresholds(leaves, base, numbers)
    key = key_for(self._key, job.name)
    try:
      step = self._step(job, leaves, base, numbers, key)
      return np.asarray(step(leaves, base, numbers, key))
    except ValueError as error:
      raise ValueError(f"{job.name}: {error}") from error

  def check(self, job: Job) -> None:
    """Nothing, if the method takes a job's settings; traced, not compiled.

    Args:
      job: what a tensor is made of.

    Raises:
      ValueError: the method's, with the tensor's name.
    """
    if job.settings is None:
      return
    settings = {name: np.float32(value) for name, value in job.settings}
    one = jax.ShapeDtypeStruct((1, 1), np.float32)
    base = None if job.base is None else one
    call = functools.partial(_merge, self._method, np.dtype(np.float32))
    try:
      jax.eval_shape(
        lambda leaves, base, key: call(leaves, base, settings, key),
        [one] * len(job.sources),
        base,
        jax.random.key(0),
      )
    except ValueError as error:
      raise ValueError(f"{job.name}: {error}") from error

  @property
  def _is_trimmed(self) -> bool:
    """Whether NumPy's selection does for TIES what takes XLA 31 passes."""
    return self._options is not None and self._plain is ties

  def _thresholds(self, leaves, base, numbers) -> np.ndarray:
    """The magnitude that the density of each model's changes reaches."""
    density = numbers.pop("density", self._defaults.get("density", 0.2))
    found = []
    shares = np.broadcast_to(np.float32(density), (len(leaves),))
    for leaf, share in zip(leaves, shares, strict=True):
      sizes = np.array(_magnitudes(leaf, base)).reshape(-1)
      count = int(count_of(share, sizes.size))
      at = sizes.size - count
      if count:
        sizes.partition(at)
      found.append(sizes[at] if count else np.nan)
    return np.asarray(found, np.float32)

  def _is_copy(self, job: Job) -> bool:
    return self._method is passthrough and job.settings == _ONE

  def _read(self, job: Job, source: Source) -> np.ndarray:
    """A source's tensor; rows that it lacks are the reference's."""
    array = read(self._models[source.model], source.side)
    if array.shape[:1] < job.shape[:1]:
      first = next(iter(self._models.values()))
      rest = read(first, Part(job.name, (slice(len(array), None),)))
      array = np.concatenate([array, rest.astype(array.dtype)])
    return array

  def _step(self, job, leaves, base, numbers, key):
    """The compiled program for these shapes; the first to ask compiles."""
    signature = (
      job.dtype,
      *(
        (x.shape, x.dtype) for x in (*leaves, *([] if base is None else [base]))
      ),
    )
    with self._lock:
      lock = self._locks.setdefault(signature, threading.Lock())
    with lock:
      if signature not in self._compiled:
        step = jax.jit(
          functools.partial(_merge, self._method, job.dtype),
          compiler_options=self._options,
        )
        self._compiled[signature] = step.lower(
          leaves, base, numbers, key
        ).compile()
    return self._compiled[signature]


@jax.jit
def _magnitudes(leaf, base):
  return jnp.abs(leaf.astype(jnp.float32) - base.astype(jnp.float32))


def _merge(method, dtype, leaves, base, numbers, key):
  """A method's result, in float32 and rounded once."""
  numbers = dict(numbers)
  stack = jnp.stack([leaf.astype(jnp.float32) for leaf in leaves])
  below = None if base is None else base.astype(jnp.float32)
  merged = method(stack, numbers.pop("weights"), below, key=key, **numbers)
  return merged.astype(dtype)


@functools.cache
def compiler_options() -> dict[str, Any] | None:
  """What programs are compiled with: on CPUs, without a slow library.

  Returns:
    Options for `jax.jit`; None where there are none, or this version of XLA
    does not know them.

  Example:
    >>> compiler_options() in (None, _PLAIN)
    True
  """
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda x: x, compiler_options=_PLAIN).lower(0).compile()
  except Exception:  # whichever way a version says that it does not know
    return None
  return _PLAIN
