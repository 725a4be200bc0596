"""Write the SOMA arrays and tables of a measurement: layers of X in blocks of cells, var, presence matrix."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma

from census_scvi.census import schema

# Rows of obs or var that are converted to Arrow at a time.
_TABLE_ROWS = 2**16


def write_table(
    parent: soma.Collection, name: str, table_schema: pa.Schema, length: int, tables: Iterator[pd.DataFrame]
) -> None:
    """Write a SOMA DataFrame, indexed by soma_joinid, from parts with `length` rows in total.

    The columns of all parts must have the same categories.
    """
    frame = parent.add_new_dataframe(
        name,
        schema=table_schema,
        index_column_names=["soma_joinid"],
        domain=[(0, max(length - 1, 0))],
        platform_config=schema.table_platform_config(table_schema),
    )
    uri = frame.uri
    # Reopen the DataFrame: dictionary columns written through the handle that created it are unreadable.
    frame.close()
    with soma.DataFrame.open(uri, "w") as frame:
        for table in tables:
            for start in range(0, len(table), _TABLE_ROWS):
                part = table.iloc[start : start + _TABLE_ROWS]
                frame.write(pa.table({field.name: _to_arrow(part[field.name], field.type) for field in table_schema}))


def _to_arrow(column: pd.Series, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_dictionary(kind):
        return pa.array(column.to_numpy(), type=kind)
    categories = pa.array(column.cat.categories.astype(str), type=kind.value_type)
    return pa.DictionaryArray.from_arrays(pa.array(column.cat.codes.to_numpy(), type=kind.index_type), categories)


def new_layer(layers: soma.Collection, name: str, shape: tuple[int, int]) -> soma.SparseNDArray:
    """Create a sparse float32 layer of X, cells x features."""
    config = schema.x_platform_config()
    return layers.add_new_sparse_ndarray(name, type=pa.float32(), shape=shape, platform_config=config)


def write_block(layer: soma.SparseNDArray, first_cell: int, block: sp.csr_matrix) -> None:
    """Write the cells from `first_cell` on, tile by tile, which is TileDB's storage order.

    TileDB's own sort of the coordinates takes four times as long as the rest of the build.
    """
    if block.nnz == 0:
        return
    cells = np.repeat(np.arange(first_cell, first_cell + block.shape[0], dtype=np.int64), np.diff(block.indptr))
    genes = block.indices.astype(np.int64)
    tile = cells // schema.X_TILE - first_cell // schema.X_TILE
    tile = tile * (block.shape[1] // schema.X_TILE + 1) + genes // schema.X_TILE
    # numpy uses radix sort for 16-bit integers; a block has far fewer than 2**15 tiles.
    order = np.argsort(tile.astype(np.uint16) if tile[-1] < 2**15 else tile, kind="stable")
    table = pa.table({"soma_dim_0": cells[order], "soma_dim_1": genes[order], "soma_data": block.data[order]})
    layer.write(table, platform_config={"tiledb": {"write": {"sort_coords": False}}})


def write_presence(
    measurement: soma.Measurement, present: npt.NDArray[Any], joinids: Sequence[int], n_datasets: int
) -> None:
    """Write which dataset (`joinids`) measured which feature, bool (datasets, features)."""
    dataset, gene = np.nonzero(present)
    array = measurement.add_new_sparse_ndarray(
        "feature_dataset_presence_matrix",
        type=pa.bool_(),
        shape=(n_datasets, present.shape[1]),
        platform_config=schema.presence_platform_config(),
    )
    with array:
        if not len(gene):
            return
        dims = {"soma_dim_0": np.asarray(joinids, dtype=np.int64)[dataset], "soma_dim_1": gene.astype(np.int64)}
        array.write(pa.table({**dims, "soma_data": np.ones(len(gene), dtype=bool)}))
