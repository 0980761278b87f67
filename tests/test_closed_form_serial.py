"""No two batched LAPACK calls of a closed form may run side by side: they can wait for ever."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdia import models
from jaxdia.client import observe
from jaxdia.closed_form import Verdict, batch, chain, recover, sparse
from jaxdia.closed_form.serial import after, batched_map

_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")


def side_by_side(text):
  """Returns the pairs of Cholesky factorisations in a compiled program that wait for neither."""
  computations, lines = {}, []
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")):
      lines = computations.setdefault(_NAME.findall(line)[0], [])
    elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line):
      lines.append((found.group(1), found.group(2).split(", metadata=")[0]))

  def factorises(operation):
    inner = [line for name in _CALLED.findall(operation) for _, line in computations.get(name, [])]
    return "potrf" in operation or any(map(factorises, inner))

  pairs, number = [], 0
  for lines in computations.values():
    waits_for, calls = {}, []
    for name, operation in lines:
      operands = [x for x in _NAME.findall(operation) if x in waits_for]
      waits_for[name] = set(operands).union(*(waits_for[x] for x in operands))
      if factorises(operation):
        pairs += [(other, name) for other in calls if other not in waits_for[name]]
        calls.append(name)
    number += len(calls)
  return pairs, number


def test_the_check_sees_what_does_not_wait():
  def two(a, b):
    return jnp.linalg.cholesky(a), jnp.linalg.cholesky(b)

  def one_after_the_other(a, b):
    first = jnp.linalg.cholesky(a)
    return first, jnp.linalg.cholesky(after(b, first))

  matrices = jnp.broadcast_to(jnp.eye(3), (5, 3, 3))
  for function, expected in ((two, 1), (one_after_the_other, 0)):
    pairs, number = side_by_side(jax.jit(function).lower(matrices, matrices).compile().as_text())
    assert (len(pairs), number) == (expected, 2)


@pytest.mark.parametrize("number", [1, 64, 70])
def test_a_batched_map_is_a_map_in_one_row(number):
  matrices = jnp.eye(3) + jnp.arange(1.0, number + 1)[:, None, None]
  mapped = jax.jit(lambda x: batched_map(jnp.linalg.cholesky, x))
  np.testing.assert_allclose(mapped(matrices), jnp.linalg.cholesky(matrices), rtol=1e-6)
  assert not side_by_side(mapped.lower(matrices).compile().as_text())[0]


@pytest.mark.parametrize(
  "options",
  [
    {"activation": "relu", "use_bias": True},
    *(
      pytest.param(options, marks=pytest.mark.slow)
      for options in ({}, {"use_bias": True}, {"activation": "relu"})
    ),
  ],
)
def test_the_closed_form_of_a_batch_factorises_in_one_row(monkeypatch, options):
  programs = {}

  def watch(module, name):
    function = getattr(module, name)

    def watched(*args):
      programs.setdefault(name, function.lower(*args).compile().as_text())
      return function(*args)

    monkeypatch.setattr(module, name, watched)

  watch(chain, "complete")
  watch(batch, "_refine")
  watch(sparse, "_search")
  watch(sparse, "examine")
  model = models.create("mlp", (6, 6, 1), 10, 0.5, hidden_sizes=(128, 128, 128), **options)
  images = np.random.default_rng(0).uniform(size=(4, 6, 6, 1))
  params, labels = model.init(jax.random.key(0)), np.arange(4)
  observation, _ = observe(jax.random.key(1), model, params, images, labels)
  recovery = recover(jax.random.key(0), model, observation)
  assert np.all(recovery.parts.verdict == Verdict.EXACT)
  assert set(programs) == {"complete", "_refine", "_search", "examine"}
  for name, text in programs.items():
    pairs, number = side_by_side(text)
    assert number and not pairs, (name, pairs)
