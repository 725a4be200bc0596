"""Mixing of minibatches: share of each batch label per minibatch, compared with a full shuffle.

    python benchmarks/shuffle.py PREPARED.h5ad [--epochs 3]

For each label, the variance of its share over minibatches is divided by the expected variance for a full shuffle. The
script prints the mean over labels; 1.0 equals a full shuffle. For comparison, it also runs the same loader on cells in
the order of the Census.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import numpy as np

from census_scvi.counts.order import CellOrder, minibatch_sizes

MINIBATCH = 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--label", default="batch")
    arguments = parser.parse_args()
    with h5py.File(arguments.prepared) as file:
        labels = file[f"obs/{arguments.label}/codes"][:]
        in_census_order = labels[np.argsort(file["obs/soma_joinid"][:])]
    generator = np.random.default_rng(0)
    sides = {
        "full shuffle": lambda epoch: labels[generator.permutation(len(labels))],
        "ours": lambda epoch: labels[_rows(len(labels), epoch)],
        "ours, on a file in the order of the Census": lambda epoch: in_census_order[_rows(len(labels), epoch)],
        "no shuffle": lambda epoch: in_census_order,
    }
    print(f"{len(labels):,} cells, {labels.max() + 1} labels ({arguments.label}), minibatches of {MINIBATCH:,}")
    for name, met in sides.items():
        inflation = np.mean([_inflation(met(epoch)) for epoch in range(arguments.epochs)])
        print(f"{name}: {inflation:.2f}")


def _rows(n_cells: int, epoch: int) -> np.ndarray:
    """Rows of the file in the order of an epoch."""
    windows = CellOrder(np.ones(n_cells, bool), seed=0).windows(epoch)
    return np.concatenate(
        [np.concatenate([np.arange(*block) for block in window.blocks])[window.chosen] for window in windows]
    )


def _inflation(labels: np.ndarray) -> float:
    """Variance of label shares over minibatches, relative to a full shuffle; mean over labels."""
    sizes = minibatch_sizes(len(labels), MINIBATCH)
    full = labels[: MINIBATCH * (len(sizes) - 1)].reshape(-1, MINIBATCH)
    ratios = []
    for label, n_cells in enumerate(np.bincount(labels)):
        share = n_cells / len(labels)
        if n_cells:
            expected = share * (1 - share) / MINIBATCH * (1 - MINIBATCH / len(labels))
            ratios.append((full == label).mean(axis=1).var() / expected)
    return float(np.mean(ratios))


if __name__ == "__main__":
    main()
