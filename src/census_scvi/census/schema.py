"""The Census schema, version 2.4.0: organisms, tables, columns, their Arrow types and storage layout.

Follows the CZ CELLxGENE Discover Census schema (docs/cellxgene_census_schema.md in chanzuckerberg/cellxgene-census).
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

CENSUS_SCHEMA_VERSION = "2.4.0"
# Files of a local Census are not validated against the CELLxGENE dataset schema, so it has no version of that schema.
DATASET_SCHEMA_VERSION = "na"


@dataclass(frozen=True)
class Organism:
    """An organism of the Census: experiment name (`homo_sapiens`), label, taxon, and names of its genes.

    Attributes
    ----------
    gene_id_prefix
        Prefix of its Ensembl ids.
    primate
        Whether its gene symbols are those of primates, in capitals: most of them do not tell which primate.
    """

    name: str
    label: str
    ontology_term_id: str
    gene_id_prefix: str
    primate: bool


ORGANISMS = {
    organism.name: organism
    for organism in (
        Organism("homo_sapiens", "Homo sapiens", "NCBITaxon:9606", "ENSG", True),
        Organism("mus_musculus", "Mus musculus", "NCBITaxon:10090", "ENSMUSG", False),
        Organism("macaca_mulatta", "Macaca mulatta", "NCBITaxon:9544", "ENSMMUG", True),
        Organism("callithrix_jacchus", "Callithrix jacchus", "NCBITaxon:9483", "ENSCJAG", True),
        Organism("pan_troglodytes", "Pan troglodytes", "NCBITaxon:9598", "ENSPTRG", True),
    )
}
PRIMATES = tuple(organism.name for organism in ORGANISMS.values() if organism.primate)

# obs columns with a label for every cell, in the order of the Census.
LABEL_COLUMNS = (
    "assay",
    "assay_ontology_term_id",
    "cell_type",
    "cell_type_ontology_term_id",
    "development_stage",
    "development_stage_ontology_term_id",
    "disease",
    "disease_ontology_term_id",
    "donor_id",
    "self_reported_ethnicity",
    "self_reported_ethnicity_ontology_term_id",
    "sex",
    "sex_ontology_term_id",
    "suspension_type",
    "tissue",
    "tissue_ontology_term_id",
    "tissue_type",
    "tissue_general",
    "tissue_general_ontology_term_id",
)

# obs columns that a file may provide; the others are computed.
SETTABLE_COLUMNS = (*LABEL_COLUMNS, "is_primary_data", "observation_joinid")

# Labels of cells for which a column is not known; in all other columns "unknown" (see `default_label`).
_LABEL_DEFAULTS = {"suspension_type": "na", "tissue_type": "tissue"}

_LABEL = pa.dictionary(pa.int32(), pa.large_string())

OBS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", _LABEL),
        *((name, _LABEL) for name in LABEL_COLUMNS[:9]),
        ("is_primary_data", pa.bool_()),
        ("observation_joinid", pa.large_string()),
        *((name, _LABEL) for name in LABEL_COLUMNS[9:]),
        ("raw_sum", pa.float64()),
        ("nnz", pa.int64()),
        ("raw_mean_nnz", pa.float64()),
        ("raw_variance_nnz", pa.float64()),
        ("n_measured_vars", pa.int64()),
    ]
)

VAR_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("feature_id", pa.large_string()),
        ("feature_name", pa.large_string()),
        ("feature_type", pa.large_string()),
        ("feature_length", pa.int64()),
        ("nnz", pa.int64()),
        ("n_measured_obs", pa.int64()),
    ]
)

# Name of the measurement of a local Census with protein counts, and its var. The public Census has no such measurement.
PROTEINS = "protein"
PROTEIN_VAR_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("feature_id", pa.large_string()),
        ("nnz", pa.int64()),
        ("n_measured_obs", pa.int64()),
    ]
)

SUMMARY_SCHEMA = pa.schema([("soma_joinid", pa.int64()), ("label", pa.large_string()), ("value", pa.large_string())])

DATASETS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("citation", pa.large_string()),
        ("collection_id", pa.large_string()),
        ("collection_name", pa.large_string()),
        ("collection_doi", pa.large_string()),
        ("dataset_id", pa.large_string()),
        ("dataset_version_id", pa.large_string()),
        ("dataset_title", pa.large_string()),
        ("dataset_h5ad_path", pa.large_string()),
        ("dataset_total_cell_count", pa.int64()),
    ]
)

ORGANISMS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("organism_ontology_term_id", pa.large_string()),
        ("organism_label", pa.large_string()),
        ("organism", pa.large_string()),
    ]
)

SUMMARY_CELL_COUNTS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("organism", _LABEL),
        ("category", _LABEL),
        ("label", pa.large_string()),
        ("ontology_term_id", pa.large_string()),
        ("total_cell_count", pa.int64()),
        ("unique_cell_count", pa.int64()),
    ]
)

# The label columns whose values are counted in census_info/summary_cell_counts.
SUMMARY_CATEGORIES = (
    "cell_type",
    "assay",
    "tissue",
    "tissue_general",
    "disease",
    "self_reported_ethnicity",
    "sex",
    "suspension_type",
)

# Assays that sequence full transcripts; X/normalized first divides their counts by the length of the gene.
FULL_GENE_ASSAYS = frozenset({"Smart-seq", "Smart-seq2", "Smart-seq3", "Smart-seq v4", "EFO:0008930", "EFO:0008931"})


# Last filter of each filter list: a damaged byte causes an error instead of a wrong value.
CHECKSUM = "ChecksumSHA256Filter"
# Rows, and columns, per tile of X on disk.
X_TILE = 2048


def default_label(column: str, organism: str) -> str:
    """Label of cells for which `column` is not known, as in the Census: "unknown", "na", or "tissue" (tissue_type)."""
    if column.startswith("self_reported_ethnicity") and organism != "homo_sapiens":
        return "na"
    return _LABEL_DEFAULTS.get(column, "unknown")


def x_platform_config() -> dict[str, Any]:
    """Storage of a layer of X: row-major tiles of 2,048 x 2,048, zstd with the fast level 3."""
    zstd = {"_type": "ZstdFilter", "level": 3}
    return _create_config(
        capacity=2**16,
        dims={
            "soma_dim_0": {"tile": X_TILE, "filters": [zstd, CHECKSUM]},
            "soma_dim_1": {"tile": X_TILE, "filters": ["ByteShuffleFilter", zstd, CHECKSUM]},
        },
        attrs={"soma_data": {"filters": ["ByteShuffleFilter", zstd, CHECKSUM]}},
        cell_order="row-major",
        tile_order="row-major",
        allows_duplicates=True,
    )


def presence_platform_config() -> dict[str, Any]:
    """Storage of the presence matrix."""
    zstd = {"_type": "ZstdFilter", "level": 9}
    return _create_config(
        dims={name: {"filters": [zstd, CHECKSUM]} for name in ("soma_dim_0", "soma_dim_1")},
        attrs={"soma_data": {"filters": [zstd, CHECKSUM]}},
    )


def table_platform_config(table_schema: pa.Schema) -> dict[str, Any]:
    """Storage of obs, var and other tables, indexed by soma_joinid.

    Duplicates are not allowed, because only then are rows read in the order of soma_joinid.
    """
    zstd = {"_type": "ZstdFilter", "level": 9}
    return _create_config(
        capacity=2**16,
        dims={"soma_joinid": {"filters": ["DoubleDeltaFilter", zstd, CHECKSUM]}},
        attrs={name: {"filters": [zstd, CHECKSUM]} for name in table_schema.names if name != "soma_joinid"},
        offsets_filters=["DoubleDeltaFilter", zstd, CHECKSUM],
        validity_filters=[zstd, CHECKSUM],
        allows_duplicates=False,
    )


def _create_config(**options: object) -> dict[str, Any]:
    """`platform_config` argument of tiledbsoma with these options."""
    return {"tiledb": {"create": options}}
