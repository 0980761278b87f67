"""Singular values of matrices of low rank: those of LAPACK, whatever the noise."""

import numpy as np
import pytest

from jaxdia.closed_form.singular import leading, values_of


@pytest.mark.parametrize("shape", [(320, 200), (150, 400), (400, 12), (6, 6)])
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-3, 0.1, 3.0])
def test_they_are_those_of_the_whole_decomposition(shape, rank, noise):
  rng = np.random.default_rng(rank)
  rank = min(rank, *shape)
  left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in shape)
  sizes = np.geomspace(1, 1e-4, rank)  # one image hardly stands out
  matrix = (left * sizes) @ right.T
  matrix += noise * sizes[-1] * rng.standard_normal(shape) / np.sqrt(max(shape))
  all_left, values, all_right = np.linalg.svd(matrix, full_matrices=False)
  np.testing.assert_allclose(values_of(matrix, rank), values, rtol=1e-7, atol=2e-14)
  found_left, found, found_right = leading(matrix, rank)
  np.testing.assert_allclose(found[:rank], values[:rank], rtol=1e-11, atol=2e-15)
  if noise < 1:  # else they are not apart from the others
    for one, other in ((found_left, all_left), (found_right.T, all_right.T)):
      mine, theirs = one[:, :rank], other[:, :rank]
      np.testing.assert_allclose(mine @ mine.T, theirs @ theirs.T, atol=1e-9)


def test_a_matrix_without_an_end_and_one_of_zeros_are_what_they_are():
  matrix = np.random.default_rng(0).standard_normal((300, 200))
  whole = np.linalg.svd(matrix, compute_uv=False)
  np.testing.assert_allclose(values_of(matrix, 3), whole, rtol=1e-12)
  np.testing.assert_array_equal(values_of(np.zeros((300, 200)), 3), np.zeros(200))
