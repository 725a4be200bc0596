"""The gate on drift: stability of labels compared with an earlier release, measured by scvi-compare-releases.py."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from census_scvi.config.run_names import COMPARISON_RECORD
from census_scvi.files.json_file import read_json
from census_scvi.publication.gates import Gate
from census_scvi.publication.settings import GatesSection
from census_scvi.workspace.identity import Identity

log = logging.getLogger(__name__)

_NOT_MEASURED = "not measured: run scvi-compare-releases.py with compare_releases.old first"


def drift_gates(folder: Path, latent: Identity, bounds: GatesSection) -> list[Gate]:
    """The gate `drift`; none if the comparison does not exist or is of another embedding, and it need not be passed.

    Parameters
    ----------
    folder
        Folder of comparison.json.
    latent
        Identity of the `latent.npy` that is published.
    bounds
        The section `gates`.
    """
    stability, detail = _measured(folder / COMPARISON_RECORD, latent)
    if math.isnan(stability) and not bounds.drift_stops:
        return []
    return [Gate("drift", stability, "at least", bounds.min_label_stability, detail, stops=bounds.drift_stops)]


def _measured(path: Path, latent: Identity) -> tuple[float, str]:
    """Label stability and its description; NaN and what to do if it was not measured for this embedding."""
    try:
        found = read_json(path)
        if found["identities"]["new"] == {"latent": latent}:
            overall, cells = found["overall"], found["cells"]
            return float(overall["label_stability"]["value"]), (
                f"share of {cells['sampled']:,} cells whose neighbors have the same most frequent"
                f" {found['settings']['label']} as in the release embedded on {found['old']['finished'][:10]};"
                f" {overall['neighbor_overlap']['value']:.1%} of the neighbors are the same"
            )
        log.info("%s is of another embedding; it is not used", path)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s); it is not used", path, error)
    return math.nan, _NOT_MEASURED
