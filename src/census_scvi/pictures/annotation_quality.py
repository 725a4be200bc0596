"""A figure of the quality of predicted labels: calibration and risk-coverage curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from census_scvi.errors import UserError
from census_scvi.pictures.canvas import Picture

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")


def draw_quality(prediction: Mapping[str, Any], title: str, methods: Mapping[str, str]) -> Figure:
    """Calibration and risk-coverage curves of the model and the baselines, on held-out reference cells.

    Parameters
    ----------
    prediction
        The entry `uns["scvi_prediction"][<labels>]` of `Atlas.predict`.
    title
        Name of the labels.
    methods
        Titles of the methods by name.

    Raises
    ------
    UserError
        There are no held-out cells.
    """
    scores = prediction.get("held_out")
    if not scores:
        raise UserError(
            "there are no held-out cells to measure accuracy: predict has none with baseline_cells=0, for cells"
            " without counts, or if no label occurs in two studies"
        )
    figure = Picture(figsize=(11, 4.5), layout="constrained")
    calibration, risk = figure.subplots(1, 2)
    for colour, (name, score) in zip(_COLOURS, scores.items(), strict=False):
        label = (
            f"{methods.get(name, name)}: accuracy {score['accuracy']:.1%},"
            f" mean over types {score['mean_over_types']:.1%}"
        )
        calibration.plot(score["probability"], score["right"], marker="o", ms=4, color=colour, label=label)
        risk.plot(score["coverage"], score["risk"], marker="o", ms=4, color=colour)
    calibration.plot([0, 1], [0, 1], color="0.7", lw=1, zorder=0)
    calibration.set(xlabel="probability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    calibration.set_title("calibration", loc="left")
    risk.set(xlabel="coverage (most confident cells first)", ylabel="risk (share of wrong labels among them)")
    risk.set(xlim=(0, 1), ylim=(0, None))
    risk.set_title("risk and coverage", loc="left")
    held_out = prediction["held_out_by"]
    figure.suptitle(f"{title}: held-out reference cells, by {held_out}", x=0.01, ha="left")
    figure.legend(loc="outside lower left", frameon=False, ncols=1)
    return figure
