"""Labels of cells by the classifier of the model itself: SCANVI."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import scvi
import torch

from census_scvi.annotation.methods import MODEL
from census_scvi.annotation.ontology import build_hierarchy
from census_scvi.annotation.protocol import Annotated, Annotation
from census_scvi.annotation.results.groups import similar_cells
from census_scvi.errors import UserError
from census_scvi.model.families import SCANVI, family_of
from census_scvi.model.safe import ModelDescription

_NOT_VALIDATED = (
    "the probabilities are those of the model's classifier: they are not calibrated on held-out cells, and a cell of a"
    " type that the model has not learned gets one of its labels; compare with method='consensus'"
)


def require_own_labels(description: ModelDescription, columns: Sequence[str]) -> None:
    """UserError unless the model has a classifier, and the only column is that of its labels."""
    if description.model != SCANVI:
        raise UserError(
            f"method {MODEL} is the classifier of a scANVI model, and this is a"
            f" {family_of(description.model).title} model; choose another method, such as consensus"
        )
    if list(columns) != [description.labels_key]:
        raise UserError(
            f"method {MODEL} predicts {description.labels_key}, which the model has learned, not"
            f" {', '.join(columns) or 'no labels'}; set labels to {description.labels_key}, or choose another method"
        )


@torch.inference_mode()
def label_probabilities(model: scvi.model.SCANVI, latent: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probability of each label, float32 (cells, labels), as `SCANVI.predict(soft=True)` computes it.

    Parameters
    ----------
    model
        A trained SCANVI model.
    latent
        float32 (cells, n_latent): posterior means of the cells.
    """
    module = model.module.eval()
    found = module.classifier(torch.from_numpy(np.ascontiguousarray(latent)).to(module.device))
    return (found.softmax(dim=-1) if module.classifier.logits else found).cpu().numpy()


def annotate_by_model(
    model: scvi.model.SCANVI,
    description: ModelDescription,
    latent: npt.NDArray[np.float32],
    empty: npt.NDArray[np.bool_],
) -> Annotated:
    """Annotate embedded cells by the model's classifier.

    Parameters
    ----------
    model, description
        A trained SCANVI model.
    latent
        float32 (cells, n_latent): posterior means of the cells.
    empty
        bool (cells,): cells without counts, which are unknown.
    """
    probability = label_probabilities(model, latent)
    annotation = Annotation(
        classes=description.labels,
        probability=probability,
        members={MODEL: probability},
        unknown=empty,
        uncertainty=(1 - probability.max(axis=1)).astype(np.float32),
        groups=similar_cells(latent),
        embedding=latent,
        validation=pd.DataFrame(),
        warnings=[_NOT_VALIDATED],
        facts={"members": [MODEL], "far": False, "known_kept": float("nan"), "left_out_found": float("nan")},
    )
    return Annotated(description.labels_key, annotation, build_hierarchy(description.labels), MODEL)
