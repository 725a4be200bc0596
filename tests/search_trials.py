"""Work of trials in tests, for processes of Ray and their forks; those import this file, which is quick."""

from __future__ import annotations

import time

from census_scvi.config.run_names import PROGRESS, STAGING
from census_scvi.files.atomic import write_json
from census_scvi.search.trials import Trial

EPOCHS = 8
FAILING = 1000


def learn(trial: Trial) -> int:
    """Work of a trial that learns as its setting says, or fails; like the command train, it records each epoch."""
    path = trial.folder / STAGING / "train" / PROGRESS
    path.parent.mkdir(parents=True, exist_ok=True)
    latent, losses = trial.settings["model.n_latent"], []
    if latent >= FAILING:
        print("error: no memory", flush=True)
        return 2
    for epoch in range(EPOCHS):
        losses.append(latent + 1 / (epoch + 1))
        write_json(path, {"elbo_train": losses, "elbo_validation": losses})
        time.sleep(0.3)
    return 0
