"""A trained classifier: its saved form, and predictions for cells that may lack some of its genes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from census_scvi.annotation.scnym.cells import CellSource, Selected, in_order, log_cpm, regrouped, to_tensor
from census_scvi.annotation.scnym.network import CellTypeClassifier
from census_scvi.annotation.scnym.settings import Hyperparameters
from census_scvi.census.gene_ids import strip_version
from census_scvi.config.versions import version
from census_scvi.errors import UserError
from census_scvi.files.atomic import replacing, write_json
from census_scvi.files.json_file import read_json
from census_scvi.model.published_record import first_problem

log = logging.getLogger(__name__)

WEIGHTS, DESCRIPTION = "classifier.safetensors", "classifier.json"
_FORMAT, _PROFILE = 1, "profile"
_CELLS = 1024  # per minibatch of a prediction
_FEW_GENES = 0.8  # share of the expected counts below which a warning is logged
_AGAIN = "train the classifier again"

Text = Annotated[str, Field(min_length=1)]


class _Description(BaseModel):
    """What is needed to rebuild a classifier, except its weights."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int = _FORMAT
    census_scvi: str
    genes: Annotated[list[Text], Field(min_length=1)]
    classes: Annotated[list[Text], Field(min_length=2)]
    settings: Hyperparameters


@dataclass(frozen=True)
class Prediction:
    """Predicted classes of cells.

    Attributes
    ----------
    classes
        Names of the classes.
    probability
        float32 (cells, classes); equal for all classes in a cell without counts.
    embedding
        float32 (cells, hidden units): last hidden layer before its ReLU.
    empty
        bool (cells,): cells without counts in the genes of the classifier.
    """

    classes: list[str]
    probability: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32]
    empty: npt.NDArray[np.bool_]

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """The most probable class of each cell."""
        return np.array(self.classes, dtype=object)[self.probability.argmax(axis=1)]

    @property
    def confidence(self) -> npt.NDArray[np.float32]:
        """The probability of that class."""
        return np.asarray(self.probability.max(axis=1))


class Classifier:
    """A trained classifier.

    Parameters
    ----------
    network
        The network; it is put into evaluation mode.
    genes, classes
        Names of its inputs and outputs.
    settings
        Hyper-parameters of its training.
    profile
        float64 (genes,): mean share of each gene in the counts of a training cell.
    """

    def __init__(
        self,
        network: CellTypeClassifier,
        genes: list[str],
        classes: list[str],
        settings: Hyperparameters,
        profile: npt.NDArray[np.float64],
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.genes, self.classes, self.settings, self.profile = genes, classes, settings, profile

    def align(self, source: CellSource, genes: list[str]) -> CellSource:
        """Bring the genes of some cells into the order of the classifier, by name.

        Missing genes are 0, so that cells are normalised over the genes that they have. Columns of the same gene are
        summed. Without its version, an Ensembl id matches, too.

        Raises
        ------
        UserError
            No gene has the name of one of the classifier's.
        """
        if list(genes) == self.genes:
            return source
        column = {gene: number for number, gene in enumerate(self.genes)}
        named = pd.Series(genes, dtype=str)
        found = strip_version(named).map(column).where(~named.isin(column), named.map(column))
        rows = np.flatnonzero(found.notna())
        columns = found.iloc[rows].to_numpy().astype(np.int64)
        there = np.unique(columns)
        if not len(there):
            such = f" (such as {genes[0]})" if genes else ""
            raise UserError(
                f"none of the {len(genes):,} genes of these cells{such} is one of the classifier's {len(self.genes):,}"
                f" (such as {self.genes[0]}); use cells of the same organism, and the same kind of gene names"
            )
        share = float(self.profile[there].sum() / self.profile.sum())
        say = log.warning if share < _FEW_GENES else log.info
        say(
            "%d of the classifier's %d genes are missing; training cells have %.0f%% of their counts in the others",
            len(self.genes) - len(there),
            len(self.genes),
            100 * share,
        )
        ones = np.ones(len(rows), np.float32)
        selection = sp.csr_matrix((ones, (rows, columns)), shape=(len(genes), len(self.genes)))
        return Selected(source, selection)

    @torch.no_grad()
    def predict(self, source: CellSource, genes: list[str], *, accelerator: str = "auto") -> Prediction:
        """Predict the classes of cells.

        Parameters
        ----------
        source
            Raw counts, or values in the same ratios.
        genes
            Names of their columns.
        accelerator
            auto, cpu or gpu.

        Raises
        ------
        UserError
            No gene is one of the classifier's, or there is no GPU.
        """
        aligned = self.align(source, genes)
        n_cells, device = source.shape[0], device_of(accelerator)
        network = self.network.to(device)
        probability = np.full((n_cells, len(self.classes)), 1 / len(self.classes), np.float32)
        embedding = np.zeros((n_cells, network.n_hidden), np.float32)
        empty = np.zeros(n_cells, bool)
        sizes = [min(_CELLS, n_cells - first) for first in range(0, n_cells, _CELLS)]
        done = 0
        for _, counts in regrouped(in_order(aligned, np.ones(n_cells, bool), None), sizes):
            place = slice(done, done := done + counts.shape[0])
            empty[place] = np.asarray(counts.sum(axis=1)).ravel() == 0
            hidden = network.penultimate(log_cpm(to_tensor(counts).to(device)))
            filled = ~empty[place]
            logits = network.classify(hidden.relu()).softmax(dim=1).cpu().numpy()
            probability[place][filled] = logits[filled]
            embedding[place] = hidden.cpu().numpy()
        if empty.any():
            log.warning(
                "%d of %d cells have no counts in the genes of the classifier: they cannot be annotated",
                empty.sum(),
                n_cells,
            )
        return Prediction(self.classes, probability, embedding, empty)

    def save(self, folder: Path) -> None:
        """Write the classifier into a folder, which may exist."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.cpu().contiguous() for name, value in self.network.state_dict().items()}
        description = _Description(
            census_scvi=version("census-scvi"), genes=self.genes, classes=self.classes, settings=self.settings
        )
        with replacing([folder / WEIGHTS]) as (partial,):
            save_file(weights | {_PROFILE: torch.from_numpy(self.profile)}, partial)
            partial.chmod(0o644)  # safetensors lets only the owner read
        write_json(folder / DESCRIPTION, description.model_dump())

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read a classifier; nothing in the folder is executed.

        Raises
        ------
        UserError
            A file is missing, damaged or of another version.
        """
        description = _read_description(folder / DESCRIPTION)
        path = folder / WEIGHTS
        try:
            weights = load_file(path)
            profile = weights.pop(_PROFILE).numpy()
            with torch.device("meta"):  # shapes without memory, so that a wrong description cannot ask for any amount
                network = CellTypeClassifier(len(description.genes), len(description.classes), description.settings)
            _check_weights(weights, network, profile)
            network.load_state_dict(weights, assign=True)
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} cannot be used ({str(error).splitlines()[0]}); {_AGAIN}") from None
        return cls(network, description.genes, description.classes, description.settings, profile)


def _read_description(path: Path) -> _Description:
    try:
        values = read_json(path)
        if isinstance(values, dict) and (found := values.get("format")) != _FORMAT:
            raise UserError(
                f"{path} has format {str(found)[:40]}, this version of census-scvi reads {_FORMAT}; {_AGAIN}, or use"
                f" the version that wrote it ({str(values.get('census_scvi'))[:40]})"
            )
        description = _Description.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train a classifier first") from None
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {_AGAIN}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); {_AGAIN}") from None
    for name, values in (("genes", description.genes), ("classes", description.classes)):
        if len(set(values)) < len(values):
            raise UserError(f"{path} is damaged ({name} are not unique); {_AGAIN}")
    return description


def _check_weights(
    weights: dict[str, torch.Tensor], network: CellTypeClassifier, profile: npt.NDArray[np.float64]
) -> None:
    """ValueError if the weights do not fit the network or are not finite."""
    expected = {name: (value.shape, value.dtype) for name, value in network.state_dict().items()}
    found = {name: (value.shape, value.dtype) for name, value in weights.items()}
    if found != expected or profile.shape != (network.n_genes,) or profile.dtype != np.float64:
        raise ValueError("the weights are not those of the described network")
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise ValueError("a weight is not a finite number")
    if not (np.isfinite(profile).all() and (profile >= 0).all() and profile.sum() > 0):
        raise ValueError("the mean profile is not one of shares")


def device_of(accelerator: str) -> torch.device:
    """The device for auto, cpu or gpu; UserError if torch finds no GPU and one is asked for."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"accelerator is {accelerator}, but torch finds no GPU here; set it to auto or cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
