"""Detection of cell types that the reference lacks as "unknown", on simulated latents with known truth.

    python benchmarks/unknown.py [--seeds 5]

Cell types are Gaussian clusters in ten dimensions, with centres 6 standard deviations from the origin. Studies differ
by an offset of one standard deviation. A share of the query's cells has a type that the reference lacks. The standard
deviation of the query is that of the reference, or 1.3 times as large (another chemistry). docs/label-transfer.md has
the results.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from census_scvi.annotation.label_transfer import LabelTransfer

DIMENSIONS, DISTANCE, CELLS_OF_A_STUDY, QUERY_CELLS = 10, 6.0, 300, 600
SPREADS, SHARES = (1.0, 1.3), (0.0, 1 / 3, 0.6, 1.0)


def main() -> None:
    """Simulate, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("census_scvi").setLevel(logging.ERROR)
    rows = pd.DataFrame(row for seed in range(arguments.seeds) for row in measure(seed))
    means = rows.groupby(["studies", "types", "spread", "missing share"], sort=False).mean().round(2)
    print(means.reset_index().to_string(index=False))


def measure(seed: int) -> Iterator[dict[str, float]]:
    """Yield one row per combination of reference and query."""
    for n_types, n_studies in itertools.product((2, 5), (1, 3)):
        generator = np.random.default_rng([seed, n_types, n_studies])
        centres = generator.normal(size=(n_types + 1, DIMENSIONS))
        centres *= DISTANCE / np.linalg.norm(centres, axis=1, keepdims=True)
        offset = 0.0 if n_studies == 1 else 1.0
        size = 2 * CELLS_OF_A_STUDY if n_studies == 1 else CELLS_OF_A_STUDY
        studies = [draw(generator, centres[:-1], np.full(n_types, 1 / n_types), size, offset) for _ in range(n_studies)]
        points, labels = (np.concatenate(values) for values in zip(*studies, strict=True))
        transfer = LabelTransfer(points, labels, np.repeat(np.arange(n_studies), size).astype(str))
        for spread, share in itertools.product(SPREADS, SHARES):
            shares = np.append(np.full(n_types, (1 - share) / n_types), share)
            cells, truth = draw(generator, centres, shares, QUERY_CELLS, offset, spread)
            found, missing = transfer.predict(cells), truth == f"type {n_types}"
            yield {
                "studies": n_studies,
                "types": n_types,
                "spread": spread,
                "missing share": round(share, 2),
                "found": found.unknown[missing].mean() if missing.any() else np.nan,
                "kept": 1 - found.unknown[~missing].mean() if not missing.all() else np.nan,
                "found, expected": transfer.bound.left_out_found,
                "kept, expected": transfer.bound.known_kept,
                "ratio": found.shift,
                "far": found.far,
            }


def draw(
    generator: np.random.Generator,
    centres: npt.NDArray[np.float64],
    shares: npt.NDArray[np.float64],
    n_cells: int,
    offset: float,
    spread: float = 1.0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.object_]]:
    """Draw the cells of a study: positions and types."""
    types = generator.choice(len(centres), n_cells, p=shares)
    moved = generator.normal(size=centres.shape[1])
    moved *= offset / np.linalg.norm(moved)
    points = centres[types] + spread * generator.normal(size=(n_cells, centres.shape[1])) + moved
    return points.astype(np.float32), np.array([f"type {number}" for number in types], dtype=object)


if __name__ == "__main__":
    main()
