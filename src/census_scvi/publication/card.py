"""The model card, generated from the built module and its provenance."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import scvi
import yaml
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from census_scvi.config.versions import version
from census_scvi.model.families import SCANVI, SCVI, TOTALVI, Family, family_of
from census_scvi.model.safe import ModelDescription
from census_scvi.publication import markdown

PICTURE = "training-curve.png"
_MEASURED = {"rna": "RNA", "protein": "protein"}
_PAPERS = {
    SCVI: "Lopez et al. (2018), *Deep generative modeling for single-cell transcriptomics*, Nature Methods 15,"
    " 1053-1058,\ndoi:10.1038/s41592-018-0229-2",
    SCANVI: "Xu et al. (2021), *Probabilistic harmonization and annotation of single-cell transcriptomics data with\n"
    "deep generative models*, Molecular Systems Biology 17, e9620, doi:10.15252/msb.20209620",
    TOTALVI: "Gayoso et al. (2021), *Joint probabilistic modeling of single-cell multi-omic data with totalVI*,\n"
    "Nature Methods 18, 272-282, doi:10.1038/s41592-020-01050-x",
}


def model_card(record: Mapping[str, Any], description: ModelDescription, n_sample: int) -> str:
    """Model card in Markdown, with the header that model hubs read.

    Parameters
    ----------
    record
        The provenance.
    description
        The model.
    n_sample
        Number of cells in the hub's `adata.h5ad`.
    """
    family = family_of(description.model)
    config, stages = record["config"], record["stages"]
    hardware = stages["train"]["hardware"]
    here = record["model"]["uri"] == "."
    return card_template("card.md.jinja").render(
        picture=PICTURE,
        record=record,
        header=Markup(_header(record, family)),
        family=family,
        description=description,
        article="A" if family.title.startswith("t") else "An",
        measured=" and ".join(_MEASURED[modality] for modality in family.modalities) + " counts",
        paper=Markup(_PAPERS[family.kind]),
        batch_key=", ".join(config["anndata"]["batch_key"]),
        organism=config["census"]["organism"].replace("_", " ").capitalize(),
        layers=record["model"]["n_layers"][0],
        widths=", ".join(map(str, record["model"]["n_hidden"])),
        likelihood={"nb": "negative binomial", "zinb": "zero-inflated negative binomial"}.get(
            record["model"]["gene_likelihood"], record["model"]["gene_likelihood"]
        ),
        **named(record),
        data=record["data"],
        predictions=record.get("predictions"),
        place="the folder with this card" if here else record["model"]["uri"],
        model_uri=record["model"]["uri"],
        prepare=stages["prepare"],
        train=stages["train"],
        hardware=", ".join(hardware.get("gpus", [])) or f"{hardware['cores']} cores",
        queries={
            "embedded": config["census"]["obs_query"] or "all",
            "model": " and ".join(
                f"({query})" for query in (config["census"]["obs_query"], config["census"]["obs_query_model"]) if query
            )
            or "all",
        },
        hyperparameters={
            **{f"train.{name}": config["train"][name] for name in ("max_epochs", "batch_size", "train_size")},
            **{f"training_plan.{name}": value for name, value in config["training_plan"].items()},
        },
        n_sample=n_sample,
    )


def named(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of the authors, and of the evaluation."""
    contact, evaluation = record["contact"], record.get("evaluation")
    return {
        "author": ", ".join(value for value in (contact["name"], contact["affiliation"]) if value),
        "contact": " ".join(value for value in contact.values() if value),
        "evaluation": evaluation,
        "others": _others(evaluation),
    }


@cache
def card_template(name: str) -> jinja2.Template:
    """A template of this folder, compiled once per process."""
    template = files("census_scvi.publication").joinpath(name).read_text(encoding="utf-8")
    # Titles, labels and reasons are untrusted text: each value is escaped when it is inserted.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=markdown.text
    )
    environment.filters |= {
        "code": markdown.code, "literal": markdown.literal, "paragraphs": markdown.paragraphs, "number": "{:,}".format,
        "rounded": _rounded,
    }  # fmt: skip
    return environment.from_string(template)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _others(evaluation: Mapping[str, Any] | None) -> list[str]:
    """Names of the other embeddings and baselines in the evaluation."""
    scores = evaluation["scores"] if evaluation else []
    return list(dict.fromkeys(name for score in scores for name in score["others"]))


def _header(record: Mapping[str, Any], family: Family) -> str:
    values = {
        "library_name": "scvi-tools",
        **({"license": record["license"].lower()} if record["license"] else {}),
        "tags": [
            "biology",
            "genomics",
            "single-cell",
            f"model_cls_name:{family.kind}",
            f"scvi_version:{scvi.__version__}",
            f"anndata_version:{version('anndata')}",
            *(f"modality:{modality}" for modality in family.modalities),
        ],
        **model_index(record),
    }
    return yaml.safe_dump(values, sort_keys=False)


def model_index(record: Mapping[str, Any]) -> dict[str, Any]:
    """Entry `model-index` of the header, from which a model hub lists the results; empty without an evaluation."""
    evaluation, census = record.get("evaluation"), record["census"]
    if not evaluation:
        return {}
    release = f"release {census['version']}" if census["version"] else f"created on {census['created_on']}"
    cells = {
        "type": "cellxgene-census" if record["data"]["cellxgene"] else "census",
        "name": f"{evaluation['cells']:,} cells of {census['organism']} in a Census {release}",
        **({"config": evaluation["obs_filter"]} if evaluation["obs_filter"] else {}),
    }
    metrics = [
        {"type": score["metric"], "name": f"{score['metric']} of {score['column']}", "value": round(score["value"], 4)}
        for score in evaluation["scores"]
        if score["value"] is not None
    ]
    task = {"type": "feature-extraction", "name": "Embedding of cells"}
    return {
        "model-index": [{"name": record["title"], "results": [{"task": task, "dataset": cells, "metrics": metrics}]}]
    }


def learning_curve(curves: Mapping[str, list[float]]) -> bytes:
    """PNG of the ELBO per epoch, for training and validation cells."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, color, line in (
        ("elbo_train", "training cells", "#0072B2", "-"),
        ("elbo_validation", "validation cells", "#D55E00", "--"),
    ):
        if name in curves:
            axes.plot(range(1, len(curves[name]) + 1), curves[name], label=label, color=color, linestyle=line)
    axes.set(xlabel="epoch", ylabel="negative ELBO per cell")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
