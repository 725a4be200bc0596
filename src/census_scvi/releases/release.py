"""A release: a run directory or a published folder, with its Census, its embedding and the records of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from census_scvi.census.embedding import publication_of
from census_scvi.census.open import Census
from census_scvi.census.settings import CensusSection, census_named
from census_scvi.census.slices import Embedding
from census_scvi.config.flat import flatten
from census_scvi.config.renamed import translate_record, translate_recorded_config
from census_scvi.errors import UserError
from census_scvi.files.uri import without_credentials
from census_scvi.model.families import family_of
from census_scvi.model.published import damaged_files, fetch, read_provenance
from census_scvi.model.safe import ModelDescription, read_description
from census_scvi.model.source import Source
from census_scvi.query.reference import Origin, PublishedEmbedding
from census_scvi.releases.places import EMBED, STAGES, identity_of, stage_record
from census_scvi.workspace import Workspace


@dataclass(frozen=True)
class Release:
    """An embedding of a Census, and how it was made.

    Attributes
    ----------
    place
        The run directory, or the published folder or its URL.
    identity
        What identifies the embedding: file or publication.
    origin
        The Census, and where the embedding is.
    obs_query
        Value filter of the embedded cells; None: all.
    settings
        Settings that were recorded, by dotted key.
    stages
        Records of the stages `STAGES`.
    description
        The model.
    batch_key
        obs columns that define the batch.
    publication
        Id of the publication; None for a run directory.
    """

    place: str
    identity: dict[str, Any]
    origin: Origin
    obs_query: str | None
    settings: dict[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    description: ModelDescription
    batch_key: list[str]
    publication: str | None = None

    @property
    def organism(self) -> str:
        """Organism of the Census."""
        return self.description.organism

    def census(self, given: str | None, tiledb: dict[str, str], setting: str) -> CensusSection:
        """Settings to open the Census; UserError if its location is not known.

        Parameters
        ----------
        given
            Its location according to the user; None: that of the record.
        tiledb
            TileDB settings.
        setting
            Setting of `given`, for the message.
        """
        section = census_named(given, self.organism) if given is not None else self.origin.section
        if section is None:
            raise UserError(f"{self.place} does not say where its Census is; give it in {setting}")
        return section.model_copy(update={"tiledb": tiledb})

    def embedding(self, census: Census) -> Embedding:
        """The embedding; UserError if it does not exist, was replaced, or is of another Census."""
        found = self.origin.own_embedding(census)
        if found is None:
            raise UserError(f"{self.place} has no record of an embedding; give a run directory or a published folder")
        if isinstance(found, PublishedEmbedding) and (now := publication_of(found.name)) != self.publication:
            raise UserError(
                f"{without_credentials(found.name)} is publication {now} now, not {self.publication} of {self.place}:"
                " it was replaced; compare the run directory instead"
            )
        return found

    def facts(self) -> dict[str, Any]:
        """Facts for the reader: Census, model, training."""
        prepare, train, embed = (self.stages[name] for name in STAGES)
        return {
            "place": without_credentials(self.place),
            "publication": self.publication,
            "census": without_credentials(self.origin.identity),
            "cells": embed["counts"]["cells"],
            "n_latent": embed["counts"]["n_latent"],
            "method": family_of(self.description.model).title,
            "genes": len(self.description.genes),
            "batches": len(self.description.batches),
            "training_cells": prepare["counts"]["cells"],
            "epochs": train["counts"]["epochs"],
            "seed": train["seed"],
            "final_metrics": train["final_metrics"],
            "finished": embed["finished"],
        }


def open_release(place: str, setting: str) -> Release:
    """Read the records of a release.

    Parameters
    ----------
    place
        Run directory with an embedding, or a published folder or its URL.
    setting
        Setting of the place, for errors.

    Raises
    ------
    UserError
        The place is neither, a stage has not run, or a file is damaged.
    """
    identity = identity_of(place, setting)
    source = Source.at(place)
    if source.run is not None:
        return _of_run(place, source.run, identity)
    folder = fetch(place)
    record = read_provenance(folder)
    if wrong := damaged_files(folder, record):
        raise UserError(f"{place} differs from what was published: {'; '.join(wrong)}")
    config = translate_recorded_config(record["config"])
    return Release(
        place,
        identity,
        Origin.of(place),
        config["census"]["obs_query"],
        flatten(config),
        record["stages"],
        read_description(folder),
        list(config["anndata"]["batch_key"]),
        record["publication"],
    )


def _of_run(place: str, directory: Path, identity: dict[str, Any]) -> Release:
    workspace = Workspace(directory)
    stages = {stage: stage_record(workspace, stage) for stage in STAGES}
    settings: dict[str, Any] = {}
    for record in stages.values():
        settings |= translate_record(record["fingerprint"]["config"])
    model = str(stages["train"]["artifacts"][0])
    workspace.check("train", [f"{model}/model.json"])
    return Release(
        place,
        identity,
        Origin.of(place),
        stages[EMBED]["fingerprint"]["config"].get("census.obs_query"),
        settings,
        stages,
        read_description(directory / model),
        list(stages[EMBED]["fingerprint"]["config"]["anndata.batch_key"]),
    )
