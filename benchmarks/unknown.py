"""How many cells of a type that the reference lacks are called unknown: simulated latents, where the truth is known.

    python benchmarks/unknown.py [--seeds 5]

Types are Gaussian clusters in ten dimensions, their centres 6 standard deviations from the origin; studies differ by an
offset of one standard deviation. The query has one more type than the reference, which is a share of its cells, and its
cells scatter as the reference's, or 1.3 times as widely (another chemistry). docs/label-transfer.md has the results.
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
    """A row for each kind of reference and query."""
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
    """Cells of a study: positions and types."""
    types = generator.choice(len(centres), n_cells, p=shares)
    moved = generator.normal(size=centres.shape[1])
    moved *= offset / np.linalg.norm(moved)
    points = centres[types] + spread * generator.normal(size=(n_cells, centres.shape[1])) + moved
    return points.astype(np.float32), np.array([f"type {number}" for number in types], dtype=object)


if __name__ == "__main__":
    main()
