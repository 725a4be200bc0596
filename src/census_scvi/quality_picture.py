"""A picture of how far predicted labels are to be believed."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from census_scvi.errors import UserError
from census_scvi.picture import Picture
from census_scvi.query.naming import TITLES

# Okabe and Ito's, told apart by colour-blind readers, too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73")


def draw_quality(prediction: dict[str, Any], title: str) -> Figure:
    """Calibration and risk-coverage curves, on reference cells held out, of the model and of what does without it.

    Parameters
    ----------
    prediction
        What `Atlas.predict` leaves in `uns["scvi_prediction"][<labels>]`.
    title
        What the labels are.

    Raises
    ------
    UserError
        Nothing was held out.
    """
    scores = prediction.get("held_out")
    if not scores:
        raise UserError(
            "nothing was held out to judge the labels by: predict reads no counts with baseline_cells=0, from cells"
            " without counts, or where no label is in two studies"
        )
    figure = Picture(figsize=(11, 4.5), layout="constrained")
    calibration, risk = figure.subplots(1, 2)
    for colour, (name, score) in zip(_COLOURS, scores.items(), strict=False):
        label = f"{TITLES[name]}: {score['accuracy']:.1%} right, {score['mean_over_types']:.1%} mean over types"
        calibration.plot(score["probability"], score["right"], marker="o", ms=4, color=colour, label=label)
        risk.plot(score["coverage"], score["risk"], marker="o", ms=4, color=colour)
    calibration.plot([0, 1], [0, 1], color="0.7", lw=1, zorder=0)
    calibration.set(xlabel="probability", ylabel="share of the cells that are named rightly", xlim=(0, 1), ylim=(0, 1))
    calibration.set_title("calibration", loc="left")
    risk.set(xlabel="share of the cells that are named, surest first", ylabel="share of these named wrongly")
    risk.set(xlim=(0, 1), ylim=(0, None))
    risk.set_title("risk and coverage", loc="left")
    held_out = prediction["held_out_by"]
    figure.suptitle(f"{title} of reference cells, {held_out} held out", x=0.01, ha="left")
    figure.legend(loc="outside lower left", frameon=False, ncols=1)
    return figure
