"""Write census_info: the summary, the tables of datasets and organisms, and cell counts by label."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import tiledbsoma as soma

from census_scvi.census import schema
from census_scvi.local_census.arrays import write_table
from census_scvi.local_census.sources import Source

# Values of donor_id that are not donors: unknown or several donors.
_NO_DONOR = ("unknown", "pooled", "na")


def write_info(info: soma.Collection, sources: Sequence[Source]) -> None:
    """Fill the collection `census_info`; the soma_joinid of a dataset is its position in `sources`."""
    tables = (
        ("summary", schema.SUMMARY_SCHEMA, _summary(sources)),
        ("datasets", schema.DATASETS_SCHEMA, _datasets(sources)),
        ("organisms", schema.ORGANISMS_SCHEMA, _organisms(sources)),
        ("summary_cell_counts", schema.SUMMARY_CELL_COUNTS_SCHEMA, _summary_cell_counts(sources)),
    )
    for name, table_schema, table in tables:
        table.insert(0, "soma_joinid", range(len(table)))
        write_table(info, name, table_schema, len(table), iter([table]))


def _used_organisms(sources: Sequence[Source]) -> list[schema.Organism]:
    used = {source.organism for source in sources}
    return [organism for name, organism in schema.ORGANISMS.items() if name in used]


def _summary(sources: Sequence[Source]) -> pd.DataFrame:
    rows = {
        "census_schema_version": schema.CENSUS_SCHEMA_VERSION,
        "census_build_date": datetime.now(UTC).date().isoformat(),
        "dataset_schema_version": schema.DATASET_SCHEMA_VERSION,
        "total_cell_count": sum(len(source.obs) for source in sources),
        "unique_cell_count": sum(int(source.obs["is_primary_data"].sum()) for source in sources),
    }
    for organism in _used_organisms(sources):
        # The same donor_id means the same person only within a dataset.
        rows[f"number_donors_{organism.name}"] = sum(
            int((~source.obs["donor_id"].drop_duplicates().isin(_NO_DONOR)).sum())
            for source in sources
            if source.organism == organism.name
        )
    return pd.DataFrame({"label": list(rows), "value": [str(value) for value in rows.values()]})


def _datasets(sources: Sequence[Source]) -> pd.DataFrame:
    rows = [
        {
            "citation": "",
            "collection_id": "",
            "collection_name": "",
            "collection_doi": "",
            "dataset_id": source.dataset_id,
            "dataset_version_id": source.dataset_id,
            "dataset_title": source.title,
            "dataset_h5ad_path": Path(source.path).name,
            "dataset_total_cell_count": len(source.obs),
        }
        for source in sources
    ]
    return pd.DataFrame(rows)


def _organisms(sources: Sequence[Source]) -> pd.DataFrame:
    used = _used_organisms(sources)
    return pd.DataFrame(
        {
            "organism_ontology_term_id": [organism.ontology_term_id for organism in used],
            "organism_label": [organism.label for organism in used],
            "organism": [organism.name for organism in used],
        }
    )


def _summary_cell_counts(sources: Sequence[Source]) -> pd.DataFrame:
    rows = []
    for organism in _used_organisms(sources):
        tables = [source.obs for source in sources if source.organism == organism.name]
        total = sum(len(table) for table in tables)
        unique = sum(int(table["is_primary_data"].sum()) for table in tables)
        rows.append((organism.label, "all", "na", "na", total, unique))
        for category in schema.SUMMARY_CATEGORIES:
            rows += [(organism.label, category, *counted) for counted in _counts(tables, category)]
    columns = ["organism", "category", "label", "ontology_term_id", "total_cell_count", "unique_cell_count"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({"organism": "category", "category": "category"})


def _counts(tables: Sequence[pd.DataFrame], category: str) -> Iterator[tuple[str, str, int, int]]:
    """(label, ontology term id, cells, unique cells) for each value of a label column."""
    term = f"{category}_ontology_term_id"
    parts = []
    for table in tables:
        terms = table[term].astype(str) if term in table else "na"
        keys = pd.DataFrame({"label": table[category].astype(str), "term": terms, "unique": table["is_primary_data"]})
        parts.append(keys.groupby(["label", "term"])["unique"].agg(["size", "sum"]))
    counts = pd.concat(parts).groupby(level=[0, 1]).sum()
    for row in counts.reset_index().itertuples(index=False):
        yield str(row[0]), str(row[1]), int(row[2]), int(row[3])
