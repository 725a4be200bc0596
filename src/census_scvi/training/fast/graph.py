"""A training step as a CUDA graph: loss and gradients of a minibatch by one launch instead of about 160.

On a fast GPU the launches of a step take several times as long as its computation. A graph repeats the recorded
kernels at the recorded addresses, so all minibatches are copied to the same memory, and all have the same number of
cells. Their numbers of non-zeros differ: that memory is larger than they need, and the kernels (`gpu_kernel`) read only
the non-zeros of each cell. Random numbers are those of the same step without a graph, because a graph takes them from
torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from census_scvi.counts.minibatch import Minibatch, SparseCounts

# Memory for non-zeros, relative to those of the minibatch that was recorded.
_ROOM = 1.25
# Steps before the recording, in which libraries choose their kernels and allocate memory.
_WARM_UP = 3

Work = Callable[[Minibatch], tuple[torch.Tensor, ...]]


class StepGraph:
    """Repeats a step for minibatches of one size.

    Parameters
    ----------
    work
        Computes the gradients of the parameters for a minibatch, and returns tensors that do not require gradients. It
        must not wait for the GPU, and use no tensors that other code replaces.
    parameters
        The parameters whose `grad` it sets.
    state
        Tensors that `work` changes, other than gradients: the recording restores their values.
    minibatch
        A minibatch for the recording.
    device
        The GPU.
    """

    def __init__(
        self,
        work: Work,
        parameters: Iterable[torch.nn.Parameter],
        state: Iterable[torch.Tensor],
        minibatch: Minibatch,
        device: torch.device,
    ) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._minibatch = _with_room(minibatch, device)
        self.copy(minibatch)
        # Detached: a clone of a parameter would keep a node of its gradient, which belongs to the current stream.
        before = [(tensor.detach(), tensor.detach().clone()) for tensor in state]
        random = torch.cuda.get_rng_state(device)
        self._graph = torch.cuda.CUDAGraph()
        current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self.clear_gradients()
                work(self._minibatch)
        current.wait_stream(aside)
        self.clear_gradients()
        # thread_local: the threads that read ahead allocate page-locked memory meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = work(self._minibatch)
        self._gradients = [parameter.grad for parameter in self._parameters]
        for tensor, value in before:
            tensor.copy_(value)
        torch.cuda.set_rng_state(random, device)

    def fits(self, minibatch: Minibatch) -> bool:
        """Whether a minibatch has the recorded number of cells, and its non-zeros have room."""
        mine, counts = self._minibatch["X"], minibatch["X"]
        return (
            len(counts) == len(mine)
            and len(counts.counts) <= len(mine.counts)
            and counts.counts.dtype == mine.counts.dtype
        )

    def __call__(self, minibatch: Minibatch) -> tuple[torch.Tensor, ...]:
        """Compute a minibatch that fits, on any device; the results of `work` are valid until the next call."""
        self.copy(minibatch)
        self._graph.replay()
        return self._results

    def set_gradients(self) -> None:
        """Make the computed gradients the `grad` of the parameters."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def copy(self, minibatch: Minibatch) -> None:
        """Copy a minibatch to the memory of the graph."""
        mine, counts = self._minibatch["X"], minibatch["X"]
        n = len(counts.counts)
        mine.n_detected.copy_(counts.n_detected, non_blocking=True)
        mine.genes[:n].copy_(counts.genes, non_blocking=True)
        mine.counts[:n].copy_(counts.counts, non_blocking=True)
        for name in ("batch", "labels"):
            self._minibatch[name].copy_(minibatch[name], non_blocking=True)

    def clear_gradients(self) -> None:
        """Remove the gradients of the parameters."""
        for parameter in self._parameters:
            parameter.grad = None


def _with_room(minibatch: Minibatch, device: torch.device) -> Minibatch:
    counts = minibatch["X"]
    room = int(_ROOM * len(counts.counts)) + 1024
    made = SparseCounts(
        torch.empty_like(counts.n_detected, device=device),
        torch.empty(room, dtype=counts.genes.dtype, device=device),
        torch.empty(room, dtype=counts.counts.dtype, device=device),
        counts.n_genes,
    )
    return {"X": made} | {name: torch.empty_like(minibatch[name], device=device) for name in ("batch", "labels")}


class StepGraphs:
    """A graph per kind of step, recorded at the second of two consecutive minibatches of the same size."""

    def __init__(self) -> None:
        self._graphs: dict[str, StepGraph] = {}
        self._last: dict[str, int] = {}  # number of cells of the last minibatch
        self._used: str | None = None  # kind of the last minibatch, if a graph was used

    def of(
        self,
        kind: str,
        minibatch: Minibatch,
        work: Work,
        parameters: Iterable[torch.nn.Parameter],
        state: Iterable[torch.Tensor],
        device: torch.device,
    ) -> StepGraph | None:
        """The graph for a minibatch, recorded if it must be; None for a size that occurs once, as at an epoch's end."""
        size, last = len(minibatch["X"]), self._last.get(kind)
        graph, self._last[kind], self._used = self._graphs.get(kind), size, None
        if graph is None or not graph.fits(minibatch):
            if size != last:
                return None
            self._graphs.pop(kind, None)  # free its memory first
            graph = self._graphs[kind] = StepGraph(work, parameters, state, minibatch, device)
        self._used = kind
        return graph

    def used(self, kind: str) -> bool:
        """Whether a graph of this kind computed the last minibatch."""
        return self._used == kind

    def set_gradients(self, kind: str) -> None:
        """Make the gradients that the graph of this kind computed the `grad` of the parameters."""
        self._graphs[kind].set_gradients()

    def clear(self) -> None:
        """Free the memory of all graphs, and the gradients in it."""
        for graph in self._graphs.values():
            graph.clear_gradients()
        self._graphs.clear()
