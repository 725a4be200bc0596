"""Measure the speed of matrix products on this processor, by library and by precision, with the model's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from scvi.module import VAE

from census_scvi.counts.minibatch import SparseCounts
from census_scvi.model import sparse_layer
from census_scvi.training.fast import products
from census_scvi.training.fast.products import Libraries, Library, times_transposed

Operands: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

_LIBRARIES: tuple[Library, ...] = ("torch", "onednn")
# Required speedup over torch's default: a clear difference gives the same choice in the next training with the same
# seed.
_FASTER = 1.2
# Products with fewer weights than this take too little time to matter or to be measured.
_FEW_WEIGHTS = 20_000
# Seconds to measure one kind of product; after a first turn longer than _LONG the measurement stops.
_SECONDS, _LONG = 0.1, 1.0


class Precision(NamedTuple):
    """Seconds for the same products in float32 (`float32`) and in another dtype (`reduced`)."""

    float32: float
    reduced: float


def shape_of(module: VAE) -> tuple[int, int]:
    """Number of genes and of hidden units of the two large layers: the encoder's first and the decoder's last."""
    n_genes, n_hidden = module.decoder.px_scale_decoder[0].weight.shape
    return n_genes, n_hidden


def faster_libraries(n_genes: int, n_hidden: int, density: float) -> Libraries:
    """The faster library for each kind of float32 product, with the number of threads that torch uses.

    Takes one to two seconds and draws no random numbers.

    Parameters
    ----------
    n_genes, n_hidden
        Shape of the two large layers.
    density
        Share of non-zero counts.
    """
    if n_genes * n_hidden < _FEW_WEIGHTS:
        return Libraries()
    libraries = Libraries()
    if products.onednn_available():
        kinds = _products(n_genes, n_hidden, torch.float32)
        faster = {kind: _faster_library(operands) for kind, operands in kinds.items()}
        libraries = Libraries(faster["forward"], faster["input_gradient"], faster["weight_gradient"])
    if sparse_layer.usable() and _sparse_is_faster(libraries, n_genes, n_hidden, density):
        libraries = replace(libraries, counts="sparse")
    return libraries


def _faster_library(operands: list[Operands]) -> Library:
    seconds = _least_seconds(
        {library: lambda library=library: _multiply(library, operands) for library in _LIBRARIES}  # type: ignore[misc]
    )
    best = min(_LIBRARIES, key=seconds.__getitem__)
    return best if _FASTER * seconds[best] < seconds["torch"] else "torch"


def _sparse_is_faster(libraries: Libraries, n_genes: int, n_hidden: int, density: float) -> bool:
    """Whether the encoder's first layer and its gradient are faster on the non-zero counts only."""
    n_cells = 512  # with fewer cells, the constant cost per minibatch would dominate
    # Each cell has the same number of non-zeros, evenly spread over the genes and shifted by one gene per cell.
    n_detected = max(1, round(density * n_genes))
    genes = (torch.arange(n_detected) * n_genes // n_detected + torch.arange(n_cells).unsqueeze(1)) % n_genes
    dtype = torch.uint16 if n_genes <= 2**16 else torch.int32  # the loader's dtypes
    counts = SparseCounts(
        torch.full((n_cells,), n_detected), genes.flatten().to(dtype), torch.ones(genes.numel()), n_genes
    )
    weight = torch.ones(n_hidden, n_genes, requires_grad=True)
    bias, slopes = torch.ones(n_hidden), torch.ones(n_cells, n_hidden)

    def dense() -> None:
        with torch.no_grad():
            x = counts.dense(log1p=True)
            times_transposed(libraries.forward, x, weight, bias)
            times_transposed(libraries.weight_gradient, slopes.T, x.T)

    def sparse() -> None:
        with torch.enable_grad():
            torch.autograd.grad(sparse_layer.sparse_layer(counts, None, weight, bias), weight, slopes)

    sparse()  # compiles the functions
    seconds = _least_seconds({"dense": dense, "sparse": sparse})
    return _FASTER * seconds["sparse"] < seconds["dense"]


def measure_precision(n_genes: int, n_hidden: int, dtype: torch.dtype) -> Precision | None:
    """Seconds for all products of a step on the CPU in float32 and in `dtype`; None if they are too small to matter."""
    if n_genes * n_hidden < _FEW_WEIGHTS:
        return None
    exact, reduced = (_products(n_genes, n_hidden, kind) for kind in (torch.float32, dtype))
    seconds = [
        _least_seconds(
            {
                "float32": lambda kind=kind: _multiply("torch", exact[kind]),  # type: ignore[misc]
                "reduced": lambda kind=kind: _multiply("torch", reduced[kind]),  # type: ignore[misc]
            }
        )
        for kind in exact
    ]
    return Precision(*(sum(some[name] for some in seconds) for name in Precision._fields))


def _products(n_genes: int, n_hidden: int, dtype: torch.dtype) -> dict[str, list[Operands]]:
    """For each kind of product, the arguments of `times_transposed` for the two large layers."""
    # Enough cells for the speed of a real minibatch, but few enough for a fraction of a second.
    n_cells = min(max(2**27 // (n_genes * n_hidden), 128), 1024)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    genes, hidden = ones(n_cells, n_genes), ones(n_cells, n_hidden)
    encoder, decoder = ones(n_hidden, n_genes), ones(n_genes, n_hidden)
    return {
        "forward": [(genes, encoder, ones(n_hidden)), (hidden, decoder, ones(n_genes))],
        "input_gradient": [(genes, decoder.T, None)],
        "weight_gradient": [(hidden.T, genes.T, None), (genes.T, hidden.T, None)],
    }


def _multiply(library: Library, operands: list[Operands]) -> None:
    for left, right, bias in operands:
        times_transposed(library, left, right, bias)


def _least_seconds(works: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """The shortest time of each, measured in turns: other processes can only make a measurement longer."""
    # With one thread, CPU time excludes other processes. With several, CPU time is not the elapsed time.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    least = dict.fromkeys(works, float("inf"))
    started, turns = time.perf_counter(), 0
    while True:
        for name, work in works.items():
            begun = clock()
            work()
            least[name] = min(least[name], clock() - begun)
        turns += 1
        if time.perf_counter() - started > (_SECONDS if turns > 1 else _LONG):
            return least
