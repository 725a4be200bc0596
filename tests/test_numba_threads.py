"""numba's threads leave torch and scikit-learn their number of threads."""

import pytest
from pipeline import forked, run_code

CALLS = {
    "log_pca": "from census_scvi.neighbors.log_pca import log_pca; log_pca(scipy.sparse.csr_matrix(points))",
    "clusters": "from census_scvi.neighbors.clusters import leiden; leiden(points, 1.0, 0)",
}
CODE = """
import numba, numpy, scipy.sparse, torch
numba.config.reload_config()
numba.np.ufunc.parallel.NUM_THREADS = 2  # as numba takes it from the environment at its import
points = numpy.random.default_rng(0).poisson(3, (60, 8)).astype(numpy.float32)
{call}
from sklearn.utils._openmp_helpers import _openmp_effective_n_threads
assert numba.np.ufunc.parallel._is_initialized
found = numba.get_num_threads(), torch.get_num_threads(), _openmp_effective_n_threads()
assert found == (2, 1, 1), found
"""


@pytest.mark.parametrize("call", CALLS)
def test_omp_num_threads_is_heeded(call: str) -> None:
    done = forked(run_code, CODE.format(call=CALLS[call]), NUMBA_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
