"""64-bit hashes of the counts of cells: two cells with different counts have equal hashes with probability 2^-64."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp


def row_hashes(counts: sp.csr_matrix) -> npt.NDArray[np.uint64]:
    """Hash the columns and values of each row.

    Parameters
    ----------
    counts
        CSR float32 (cells, genes), indices sorted, no explicit zeros.

    Returns
    -------
    uint64 (cells,), the same on every machine.
    """
    hashes = np.empty(counts.shape[0], np.uint64)
    _hash_rows(counts.indptr, counts.indices, counts.data.astype(np.float32, copy=False).view(np.uint32), hashes)
    return hashes


def count_hashes(counts: sp.csr_matrix, proteins: npt.NDArray[np.float32] | None) -> npt.NDArray[np.uint64]:
    """Hash of the counts of each cell, with those of proteins, uint64 (cells,).

    Parameters
    ----------
    counts
        CSR (cells, genes).
    proteins
        (cells, proteins), or None.
    """
    return row_hashes(counts if proteins is None else sp.hstack([counts, sp.csr_matrix(proteins)], format="csr"))


@numba.njit(nogil=True, cache=True)
def _hash_rows(indptr, indices, bits, hashes):  # type: ignore[no-untyped-def]  # numba infers the types
    for row in range(len(hashes)):
        state = np.uint64(0x9E3779B97F4A7C15)
        for i in range(indptr[row], indptr[row + 1]):
            # The finaliser of splitmix64 (Steele, Lea & Flood 2014), applied to one non-zero after another.
            state ^= (np.uint64(indices[i]) << np.uint64(32)) | np.uint64(bits[i])
            state += np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
        hashes[row] = state
