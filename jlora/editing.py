# SPDX-License-Identifier: Apache-2.0
"""Edits that write facts into a matrix, as ordinary Loras: ROME and MEMIT.

A linear layer is seen as a memory. It answers a key, which is what the layer
reads at a subject's last token, with a value. The change that gives keys new
values and disturbs all other inputs least has a closed form and one unit of
rank for each key. The other inputs are known by their second moment
C = E[x xᵀ], (in, in), such as `moment.total / moment.count` of
`second_moments`. `fit_value` finds a value that makes the model say something
else, by gradient descent.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jax.core import Tracer

from jlora.loras import Lora, Loras
from jlora.messages import name_some
from jlora.numerics.backends import library_of

with epy.lazy_imports():  # needed only to solve systems of NumPy arrays
  import scipy.linalg

with epy.lazy_imports():  # needed only by fit_value
  import optax

Read = Callable[[Loras, str], tuple[Any, Any]]


def address_of(key: Any, moment: Any, *, ridge: float = 0.0) -> Any:
  """Computes the direction that reads 1 on a key and least on other inputs.

      a = C⁻¹ k / (kᵀ C⁻¹ k),   the minimum of aᵀ C a with aᵀ k = 1

  An edit of this key is `aᵀ b` with any b. It adds (a · x) b to the output for
  an input x: exactly b for the key, and nothing where xᵀ C⁻¹ k = 0.

  Args:
    key: (in,).
    moment: (in, in), the second moment C up to a factor.
    ridge: share of C's mean eigenvalue that is added to its diagonal. Needed
      where C is singular: fewer inputs than `in`, or a channel never used. With
      any ridge the key reads as 1.

  Returns:
    (in,), float64 if an argument is, else float32; NumPy's if both arguments
    are. Costs a Cholesky factorisation, `in³ / 3` operations, which every
    device does in full under sharding.

  Raises:
    ValueError: shapes that do not fit, a ridge below 0, a key of zero, or a
      moment that is not positive definite. Under `jit` the last two are NaN.

  Example:
    >>> moment = np.diag(np.array([1.0, 4.0], np.float32))
    >>> address_of(np.ones(2, np.float32), moment).round(4)
    array([0.8, 0.2], dtype=float32)

  References:
    ROME (Meng et al., 2022), kmeng01/rome `compute_u`.
  """
  return _addresses(key[None], moment, 0.0, ridge)[0]


def edit_key(
  weight: Any, key: Any, value: Any, moment: Any, *, ridge: float = 0.0
) -> Lora:
  """Returns the Lora that makes a matrix answer one key with a value (ROME).

      (w + aᵀ b)ᵀ k = v,   a = C⁻¹ k / (kᵀ C⁻¹ k),   b = v - wᵀ k

  Of all changes D with (w + D)ᵀ k = v it has the least tr(Dᵀ C D), the mean
  square of what a change does to other inputs.

  Args:
    weight: (in, out).
    key: (in,), the same wherever k stands in the formulas. The first code of
      ROME used a mean over prompts in C⁻¹ k and a single prompt's key in the
      rest; such edits break models.
    value: (out,), the layer's new answer, without its bias.
    moment: as for `address_of`.
    ridge: as for `address_of`.

  Returns:
    Lora with a (1, in), b (1, out), scale 1; dtypes and cost as `address_of`.

  Raises:
    ValueError: as `address_of`.

  Example:
    >>> moment = np.diag(np.array([1.0, 4.0], np.float32))
    >>> key, value = np.float32([1, 1]), np.float32([2, 0])
    >>> lora = edit_key(np.eye(2, dtype=np.float32), key, value, moment)
    >>> (key @ (np.eye(2) + lora.a.T @ lora.b)).round(4)
    array([2., 0.])

  References:
    ROME (Meng et al., 2022); one key everywhere: Rebuilding ROME (Gupta et
    al., 2024).
  """
  needed = (*key.shape, *value.shape)
  if len(needed) != 2 or weight.shape != needed:
    raise ValueError(
      f"weight {weight.shape} does not fit key {key.shape} and value "
      f"{value.shape}: needed are (in, out), (in,) and (out,)."
    )
  weight, key, value, moment = _alike(weight, key, value, moment)
  with jax.default_matmul_precision("highest"):
    residual = value - key @ weight
  return edit_keys(key[None], residual[None], moment, balance=0.0, ridge=ridge)


def edit_keys(
  keys: Any,
  residuals: Any,
  moment: Any,
  *,
  balance: float,
  ridge: float = 0.0,
) -> Lora:
  """Returns the Lora that adds residuals to a matrix's answers to keys (MEMIT).

      aᵀ = (λ C + Kᵀ K)⁻¹ Kᵀ = C⁻¹ Kᵀ (λ I + K C⁻¹ Kᵀ)⁻¹,   b = R

  This minimises ‖K D - R‖² + λ tr(Dᵀ C D) over changes D. The second form is
  solved: it has as many unknowns as there are keys, and stays well posed as λ
  goes to 0. At λ = 0 every key gets its whole residual, and one key gives
  `edit_key`.

  Args:
    keys: (m, in), one a row. A key that occurs twice needs λ > 0 and shares
      its residuals.
    residuals: (m, out), the wanted answers less the present ones.
    moment: (in, in), the second moment C of inputs. It must be the mean, since
      λ weighs it.
    balance: λ, the number of inputs that C stands for against each key. The
      authors took 15000 for GPT-J, 20000 for GPT-2 XL. A smaller λ brings out
      more of the residuals and disturbs other inputs more.
    ridge: as for `address_of`.

  Returns:
    Lora with a (m, in), b (m, out) the residuals unchanged, scale 1; dtypes
    and cost as `address_of`.

  Raises:
    ValueError: shapes that do not fit, a balance or ridge below 0, or a system
      that is not positive definite: C singular, or with λ = 0 keys that depend
      on each other. Under `jit` the last is NaN.

  Example:
    >>> moment = np.diag(np.array([1.0, 4.0], np.float32))
    >>> key, residual = np.float32([[1, 1]]), np.float32([[1, -1]])
    >>> lora = edit_keys(key, residual, moment, balance=1.0)
    >>> (key @ lora.a.T @ lora.b).round(4)
    array([[ 0.5556, -0.5556]], dtype=float32)

  References:
    MEMIT (Meng et al., 2023), kmeng01/memit `execute_memit`.
  """
  if residuals.ndim != 2 or len(residuals) != len(keys):
    raise ValueError(
      f"residuals {residuals.shape} do not fit keys {keys.shape}: needed are "
      "(m, out) and (m, in)."
    )
  keys, residuals, moment = _alike(keys, residuals, moment)
  a = _addresses(keys, moment, balance, ridge)
  return Lora(a, residuals, library_of(a).ones((), np.float32))


def edit_layers(
  paths: Sequence[str],
  read: Read,
  moments: Mapping[str, Any],
  *,
  balance: float,
  ridge: float = 0.0,
) -> Loras:
  """Spreads an edit over several layers, each taking its share of what is left.

      R_i = (z - h_i) / (n - i),   i = 0 .. n - 1

  h_i is the hidden state after the edits of the layers before, so each layer
  also makes up for what those missed.

  Args:
    paths: the matrices, the lowest layer first.
    read: (Loras so far, path) -> the keys (m, in) of that matrix, and what is
      left, z - h (m, out), both from the model with these Loras applied.
    moments: path -> (in, in), as for `edit_keys`.
    balance: as for `edit_keys`.
    ridge: as for `address_of`.

  Returns:
    {path: Lora}, each of rank m. Costs one `read` and one `edit_keys` a layer.

  Raises:
    ValueError: no path, a path given twice or without a moment; else as
      `edit_keys`.

  Example:
    >>> eye = np.eye(2, dtype=np.float32)
    >>> def read(loras, path):
    ...   done = sum(lora.b for lora in loras.values())
    ...   return eye[:1], np.float32([[6, 0]]) - done
    >>> found = edit_layers("vw", read, {"v": eye, "w": eye}, balance=0.0)
    >>> found["v"].b, found["w"].b
    (array([[3., 0.]], dtype=float32), array([[3., 0.]], dtype=float32))

  References:
    MEMIT (Meng et al., 2023), kmeng01/memit `execute_memit`.
  """
  paths = list(paths)
  if not paths or len(set(paths)) < len(paths):
    raise ValueError(f"paths must be some, each once, got {name_some(paths)}.")
  if missing := [path for path in paths if path not in moments]:
    raise ValueError(
      f"{len(missing)} paths have no moment: {name_some(missing)}; there are "
      f"{name_some(sorted(moments))}."
    )
  loras: Loras = {}
  for done, path in enumerate(paths):
    keys, left = read(dict(loras), path)
    share = left / np.float32(len(paths) - done)
    loras[path] = edit_keys(
      keys, share, moments[path], balance=balance, ridge=ridge
    )
  return loras


def fit_value(
  loss: Callable[..., jax.Array],
  start: jax.Array,
  *context: Any,
  radius: float = 4.0,
  decay: float = 0.5,
  steps: int = 20,
  learning_rate: float = 0.5,
  until: float = 0.05,
) -> tuple[jax.Array, dict[str, list[float]]]:
  """Fits what to add to a value so that the model says something else.

      min over ‖δ‖ ≤ radius ‖v‖ of loss(δ) + decay ‖δ‖ / ‖v‖²

  Adam starts at δ = 0; after each step δ is projected into the ball. Defaults
  are those of ROME's code for GPT-2 XL; MEMIT takes radius 0.75 and 25 steps.

  Args:
    loss: `(delta (out,), *context) -> ()`, differentiable, in nats. Usually
      the target's negative log-likelihood, averaged over prompts with different
      prefixes, plus 0.0625 KL(after ‖ before) of what follows the subject. It
      is compiled once for each function and shapes: pass the same function
      each time, and parameters and tokens as context.
    start: (out,) v, what the layer answers now.
    *context: further arguments of the loss, pytrees.
    radius: of the ball, in units of ‖v‖.
    decay: weight of the norm of δ, which the authors' code does not square.
    steps: the most evaluations; after the last one δ is not moved.
    learning_rate: Adam's.
    until: stops once loss plus decay is below this.

  Returns:
    δ (out,) float32, and {"loss": loss plus decay, "norm": ‖δ‖}, lists with an
    entry for each evaluation. Each costs a forward and a backward pass.

  Raises:
    ValueError: a start that is zero or not a vector, no steps, or a loss that
      is not finite.

  Example:
    >>> far = lambda delta, target: jnp.sum((delta - target) ** 2)
    >>> start = jnp.array([3.0, 4.0])
    >>> delta, history = fit_value(far, start, jnp.array([0.0, 30.0]))
    >>> bool(jnp.linalg.norm(delta) <= 20), len(history["loss"])
    (True, 20)

  References:
    ROME (Meng et al., 2022), kmeng01/rome `compute_v`, read at 0874014.

  Approximation:
    The authors add δ to the layer's output at the subject's last token. Here
    the loss decides where δ goes. With `w + aᵀ δ`, a from `address_of`, it fits
    the change that is deployed, at every token.
  """
  start = jnp.asarray(start, jnp.float32)
  size = float(jnp.linalg.norm(start))
  if start.ndim != 1 or not 0 < size < np.inf or steps < 1:
    raise ValueError(
      "start must be a vector (out,) other than zero and steps 1 or more, got "
      f"{start.shape} of norm {size} and {steps}."
    )
  delta = jnp.zeros_like(start)
  state = optax.adam(learning_rate).init(delta)
  history: dict[str, list[float]] = {"loss": [], "norm": []}
  for turn in range(steps):
    rates = learning_rate, decay / size**2, radius * size
    total, norm, moved, state = _step(loss, delta, state, rates, context)
    history["loss"].append(float(total))
    history["norm"].append(float(norm))
    if not np.isfinite(history["loss"][-1]):
      raise ValueError(
        f"the loss is {history['loss'][-1]} at step {turn}, ‖δ‖ {float(norm)}: "
        "take a smaller learning_rate or radius."
      )
    if history["loss"][-1] < until:
      break
    if turn < steps - 1:
      delta = moved
  return delta, history


def _alike(*arrays: Any) -> list[Any]:
  """Converts all to one library and dtype: float64 if any is, else float32."""
  xp = np if all(library_of(x) is np for x in arrays) else jnp
  wide = any(np.dtype(x.dtype) == np.float64 for x in arrays)
  dtype = np.dtype(np.float64 if wide else np.float32)
  if xp is jnp:
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # without x64: float32
  return [xp.asarray(x, dtype) for x in arrays]


def _addresses(keys: Any, moment: Any, balance: float, ridge: float) -> Any:
  """Computes (λ I + K C⁻¹ Kᵀ)⁻¹ K C⁻¹, of shape (m, in)."""
  size = keys.shape[-1]
  if keys.ndim != 2 or moment.shape != (size, size):
    raise ValueError(
      f"moment {moment.shape} does not fit keys {keys.shape}: needed are "
      "(in, in) and (m, in), for one key (in,)."
    )
  if not (balance >= 0 and ridge >= 0):
    raise ValueError(
      f"balance and ridge must be 0 or more, got {balance} and {ridge}."
    )
  keys, moment = _alike(keys, moment)
  xp = library_of(moment)
  with jax.default_matmul_precision("highest"):
    added = ridge * xp.trace(moment) / size
    moment = moment + added * xp.eye(size, dtype=moment.dtype)
    spread = _solve(moment, keys.T)
    gram = keys @ spread + balance * xp.eye(len(keys), dtype=moment.dtype)
    return _solve((gram + gram.T) / 2, spread.T)


def _solve(matrix: Any, right: Any) -> Any:
  """Solves a system with a symmetric positive definite matrix, or raises."""
  try:
    if library_of(matrix) is np:
      found = scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix), right)
    else:
      lower = jax.scipy.linalg.cho_factor(matrix, lower=True)
      found = jax.scipy.linalg.cho_solve(lower, right)
    is_bad = not isinstance(found, Tracer) and not bool(
      np.isfinite(found).all()
    )
  except (np.linalg.LinAlgError, ValueError):  # NaN or not definite
    is_bad, found = True, right
  if is_bad:
    raise ValueError(
      f"a system of {len(matrix)} unknowns is not positive definite: the "
      "moment is singular (take more inputs, or a ridge such as 1e-4), or keys "
      "depend on each other (take a balance above 0), or something is NaN."
    )
  return found


@functools.partial(jax.jit, static_argnums=0)
def _step(loss, delta, state, rates, context):
  """Takes one Adam step: loss plus decay, ‖δ‖, the next δ and Adam's state."""
  rate, decay, radius = rates

  def whole(delta):
    """Returns the loss plus the decay of δ's norm."""
    # δ starts at zero, where a plain norm has no gradient.
    norm = optax.safe_norm(delta, 1e-12)
    return loss(delta, *context).astype(jnp.float32) + decay * norm

  total, gradient = jax.value_and_grad(whole)(delta)
  with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps in int32
    change, state = optax.adam(rate).update(gradient, state)
  moved = optax.projections.projection_l2_ball(delta + change, radius)
  return total, jnp.linalg.norm(delta), moved, state
