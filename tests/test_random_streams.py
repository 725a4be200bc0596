"""Random numbers of different purposes are independent, and the same in every run."""

from __future__ import annotations

import ast
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pipeline import ROOT

from census_scvi.config.random_streams import Stream, draw, generator


@given(seed=st.integers(0, 2**32), numbers=st.lists(st.integers(0, 5), max_size=2))
def test_streams_repeat_and_do_not_meet(seed: int, numbers: list[int]) -> None:
    drawn = {stream: generator(seed, stream, *numbers).integers(2**62) for stream in Stream}
    assert drawn == {stream: generator(seed, stream, *numbers).integers(2**62) for stream in Stream}
    assert all(one != other for one, other in itertools.combinations(drawn.values(), 2))


@given(n_cells=st.integers(0, 50), size=st.integers(0, 60), seed=st.integers(0, 100))
def test_a_draw_is_ascending_and_without_repeats(n_cells: int, size: int, seed: int) -> None:
    drawn = draw(n_cells, size, generator(seed, Stream.MEASURED_CELLS))
    assert len(drawn) == min(size, n_cells)
    assert (np.diff(drawn) > 0).all()
    assert set(drawn.tolist()) <= set(range(n_cells))


def test_no_stream_is_made_by_hand() -> None:
    """A list behind `default_rng` is a stream that the table does not have."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("default_rng"):
                by_hand = any(isinstance(argument, ast.List | ast.Tuple) for argument in node.args)
                assert not by_hand or path.name == "random_streams.py", path
