# SPDX-License-Identifier: Apache-2.0
"""Reads, compares, factors and measures one pair of tensors at a time.

`Extractor` decides what becomes of a pair; `measure_parameter` factors one
change. On a CPU the step runs on NumPy arrays: compiling it would take longer
than many models need, and a GEMM is as fast. On accelerators, and for tensors
that lie on several devices, it is compiled once per shape, dtype and device and
shared by all threads.
"""

import functools
import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jlora.extraction.parameters import (
  check_factors,
  factor_change,
  words_for,
)
from jlora.extraction.planning import ModuleJob
from jlora.factoring.certificates import certificate
from jlora.factoring.deltas import survey
from jlora.factoring.factorisers import Factoriser
from jlora.factoring.figures import Measured, summarise
from jlora.factoring.rounding import ulp_histogram
from jlora.formats.fingerprints import describe_sample, sample_of
from jlora.loras import exchange
from jlora.numerics.backends import library_of, wide_dtype, words_of
from jlora.pairing.comparison import (
  check_finite,
  is_equal,
  read_pair,
  stored_dtype,
)
from jlora.pairing.pairs import TensorPart
from jlora.paths import key_for
from jlora.runs.compiled import Programs
from jlora.selection import is_floating
from jlora.views import MatrixView


class Outcome(NamedTuple):
  """What became of a pair: its status, factors and figures.

  Attributes:
    status: "extracted", "unchanged", "kept whole" or "not representable".
    why: the reason, where the status alone does not say it.
    arrays: `a` and `b` of an extracted module.
    figures: its figures, for JSON.
  """

  status: str
  why: str = ""
  arrays: Mapping[str, np.ndarray] = {}
  figures: Mapping[str, Any] = {}


_EQUAL = "equal in value, not in bytes"
_TOO_SMALL = "the change is smaller than any number of float32"
# glibc maps and unmaps every block larger than the largest it saw freed, up to
# 32 MiB: half of a run's page faults. Freeing one such block stops that.
_MAPPED = 2**25 - 2**13


class Extractor:
  """A factoriser of pairs of tensors that several threads may call.

  Args:
    factor: the factoriser.
    dtype: storage dtype of the factors.
    key: PRNG key; each module uses its own, from its path.
    on_host: whether the step runs on NumPy arrays; None: if JAX has only CPUs.

  Attributes:
    devices: those that threads should share; empty on the host.
    compilations: how many distinct shapes were compiled so far.

  Example:
    >>> from jlora.factoring import svd
    >>> from jlora.pairing.pairs import Pair, TensorPart
    >>> w = np.zeros((3, 5), np.float32)
    >>> step = Extractor(svd, np.float32, None)
    >>> pair = Pair("w", (3, 5), TensorPart("w"), TensorPart("w"))
    >>> job = ModuleJob(pair, MatrixView(), rank=2, nbytes=120)
    >>> step(job, {"w": w}, {"w": w + 1}).status
    'extracted'
  """

  def __init__(
    self,
    factor: Factoriser,
    dtype: Any,
    key: jax.Array | None,
    on_host: bool | None = None,
  ):
    self._factor, self._dtype, self._key = factor, dtype, key
    is_cpu = on_host is None and jax.default_backend() == "cpu"
    self._on_host = is_cpu or bool(on_host)
    self._programs = Programs()
    self._own = threading.local()
    self.devices = [] if self._on_host else jax.local_devices()
    if self._on_host:
      np.empty(_MAPPED, np.uint8)  # freed at once, never written

  @property
  def compilations(self) -> int:
    """Counts the distinct shapes compiled so far."""
    return len(self._programs)

  def use(self, device: Any) -> None:
    """Makes this thread compute on the given device, not the default one.

    Args:
      device: one of `devices`.
    """
    self._own.device = device

  def __call__(
    self,
    job: ModuleJob,
    base: Mapping[str, Any],
    finetuned: Mapping[str, Any],
  ) -> Outcome:
    """Factors a pair whose two sides differ in bytes (see `is_same`).

    Args:
      job: the pair, and what is done with it.
      base: the base, name -> array.
      finetuned: the finetune.

    Returns:
      Outcome.

    Raises:
      ValueError: NaN or infinity in either tensor, or factors larger than
        their dtype holds.
    """
    rooms = None
    if self._on_host:
      rooms = [functools.partial(self._room, side) for side in ("base", "ft")]
    pair, view = job.pair, job.view
    left, right = read_pair(pair, base, finetuned, rooms)
    if not is_floating(left.dtype) or not is_floating(right.dtype):
      same = np.array_equal(left, right)
      why = "" if same else f"not floating: {left.dtype} and {right.dtype}"
      return Outcome("unchanged" if same else "not representable", why)
    if not pair.whole and not (view and job.rank) and is_equal(left, right):
      return Outcome("unchanged", _EQUAL)
    if job.is_refused:
      return Outcome("not representable", "not selected")
    if pair.whole or view is None:
      check_finite(pair.path, right)
      return Outcome("kept whole", job.why)
    return self._factored(
      job, left, right, stored_dtype(finetuned, pair.finetuned)
    )

  def split(
    self,
    job: ModuleJob,
    sides: tuple[jax.Array, jax.Array],
    stored: np.dtype,
  ) -> Outcome:
    """Factors a pair that lies on several devices.

    Args:
      job: the pair, and what is done with it.
      sides: the base and the finetune, from `place_array`. Every process that
        holds a part of them must call this, in the same order.
      stored: dtype of the finetune's file.

    Returns:
      Outcome, on each of these processes.

    Raises:
      ValueError: NaN or infinity in either tensor.
    """
    return self._factored(job, *sides, stored)

  def _factored(self, job: ModuleJob, left, right, stored) -> Outcome:
    """Factors and measures a change; "unchanged" if it is zero."""
    pair, view = job.pair, job.matrix_view
    shape = view.shape(pair.shape)
    rank = min(job.rank, *shape[-2:])
    sample = self._sample(left)
    measured = self._measured(pair.path, left, right, view, rank, stored)
    norm = np.asarray(measured.certificate.norm)
    if not np.all(np.isfinite(norm)):
      check_finite(pair.path, left, right)
      raise ValueError(
        f"{pair.path}: the change is larger than float32 holds; the checkpoint "
        "is damaged or training diverged."
      )
    check_factors(pair.path, measured.lora, self._dtype)
    figures = summarise(
      jax.tree.map(np.asarray, measured.certificate),
      np.asarray(measured.sigma),
      shape,
      base_norm=float(measured.base_norm),
      noise_std=float(measured.noise_std),
      unchanged=float(measured.unchanged),
      ulps=np.asarray(measured.ulps),
    )
    if figures["norm"] == 0:
      is_small = wide_dtype(left, right) is np.float64
      if is_small and not is_equal(np.asarray(left), np.asarray(right)):
        return Outcome("not representable", _TOO_SMALL)
      return Outcome("unchanged", _EQUAL)
    arrays = {
      "a": np.asarray(measured.lora.a),
      "b": np.asarray(measured.lora.b),
    }
    figures["shape"] = list(shape)
    size = float(measured.base_norm)
    # Where the base has this parameter by this name, and float32 its norm.
    if pair.base == TensorPart(pair.path) and math.isfinite(size):
      figures["fingerprint"] = describe_sample(
        pair.path, sample, pair.shape, size
      )
    return Outcome("extracted", "", arrays, figures)

  def _sample(self, left: Any) -> np.ndarray:
    """Returns the base's numbers that its fingerprint is of.

    Of a cut array every process that has a part gets all.
    """
    at = sample_of(left.shape)
    if not isinstance(left, jax.Array):
      return np.array(left[at])
    sharding: Any = left.sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda x: x[at], out_shardings=whole)(left))

  def _measured(self, path, left, right, view, rank, stored) -> Measured:
    """Runs `measure_parameter` on the host, or its compiled form."""
    options = {
      "view": view,
      "rank": rank,
      "factor": self._factor,
      "dtype": self._dtype,
      "stored": stored,
    }
    is_split = isinstance(left, jax.Array)
    # JAX would round float64 to float32 before the difference is taken.
    is_wide = wide_dtype(left, right) is np.float64
    if (self._on_host or is_wide) and not is_split:
      words = words_for(self._key, path)
      room = self._room("delta", left.size, np.float32)
      return measure_parameter(left, right, words, **options, room=room)
    words = words_of(key_for(self._key, path))
    if is_split:
      spread: Any = left.sharding
      whole = NamedSharding(spread.mesh, PartitionSpec())
      places = spread, spread, whole
    else:
      device = getattr(self._own, "device", None) or jax.local_devices()[0]
      whole = SingleDeviceSharding(device)
      places = whole, whole, whole
      left, right, words = jax.device_put((left, right, words), device)
    step = self._step((left, right, words), places, whole, options)
    return step(left, right, words)

  def _room(self, name: str, size: int, dtype: Any = np.uint8) -> np.ndarray:
    """Returns this thread's buffer of a name, reused for every module."""
    own = self._own.__dict__
    if name not in own or own[name].size < size:
      own.pop(name, None)  # freed before more is allocated
      own[name] = np.empty(size, dtype)
    return own[name]

  def _step(self, arrays, places, results, options):
    """Returns the compiled step for these shapes; compiles it once."""
    shapes = tuple(
      jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
      for array, place in zip(arrays, places, strict=True)
    )
    step = functools.partial(_with_words, _kind_of(self._key), options)
    return self._programs.get(
      (*shapes, *options.values()),
      lambda: jax.jit(step, out_shardings=results).lower(*shapes).compile(),
    )


def measure_parameter(
  base: Any,
  finetuned: Any,
  key: Any,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser,
  dtype: Any,
  stored: Any,
  room: np.ndarray | None = None,
) -> Measured:
  """Factors one parameter's change, rounds the factors and certifies them.

  Args:
    base: the parameter, any floating dtype, its own layout; a NumPy or a JAX
      array, and the result is of the same kind.
    finetuned: the same shape.
    key: PRNG key of the module; for NumPy, the words of one.
    view: how the layout is read as a matrix; static, as all below.
    rank: triplets to keep.
    factor: the factoriser; it is given the delta's `sums` if it takes them.
    dtype: storage dtype of the factors.
    stored: dtype of the finetune's file, for its rounding noise.
    room: memory for the delta, as in `survey`; NumPy only.

  Returns:
    Measured; its norm is NaN if the change is not finite. Pure; costs one call
    of the factoriser and one certificate.

  Example:
    >>> from jlora.factoring import svd
    >>> w = np.zeros((3, 5), np.float32)
    >>> m = measure_parameter(w, w + 1, None, view=MatrixView(), rank=1,
    ...   factor=svd, dtype=np.float32, stored=np.float32)
    >>> m.certificate.errors.shape
    (2,)
  """
  delta, found = survey(base, finetuned, stored, room)
  one = factor_change(
    delta, found, key, view=view, rank=rank, factor=factor, dtype=dtype
  )
  with np.errstate(over="ignore", invalid="ignore"):  # told by the caller
    certified = certificate(one.delta, one.lora, key, **one.sums)
  norm = library_of(delta).where(found.is_finite, certified.norm, np.nan)
  return Measured(
    lora=exchange(one.lora) if one.is_exchanged else one.lora,
    sigma=one.sigma,
    certificate=certified._replace(norm=norm),
    base_norm=found.base_norm,
    noise_std=found.noise_std,
    unchanged=found.unchanged,
    ulps=ulp_histogram(base, finetuned, stored),
  )


def _with_words(kind, options, base, finetuned, words) -> Measured:
  """Runs the step with its key as plain words, which need no placing."""
  key = jax.random.wrap_key_data(words, impl=kind)
  return measure_parameter(base, finetuned, key, **options)


def _kind_of(key: jax.Array | None) -> Any:
  """Returns which generator a key is for; None is the default one."""
  if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return None
  return jax.random.key_impl(key)
