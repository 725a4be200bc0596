"""Names of all files and folders in a run directory, and checks of names and locations from settings."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from census_scvi.files.uri import local_path

MANIFEST = "manifest.json"
LOCK = ".lock"
STAGING = ".partial"
GENES = "hv_genes.pkl"
TENSORBOARD = "tb_logs"
LATENT = "latent.npy"
LATENT_JOINIDS = "latent-idx.npy"
LATENT_HASHES = "latent-hash.npy"
MINIFIED = "final_scvi_optimized"
# Folder of the indexes for nearest cells, and the file in it that describes them.
INDEX, INDEX_RECORD = "index", "index.json"
# Files in the folder of a model.
WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"
# File in the folder of a model that was adapted to a query.
SURGERY = "surgery.json"
# File in a published folder.
PROVENANCE = "provenance.json"
QA = "qa.json"
PUBLISHED = "published"
# Keys of the cells that a fine-tuned model has seen.
SEEN_CELLS = "seen-cells.npy"
# Folder of `fine-tune --decide`, and in it the keys of held-out cells.
DECISION, HELD_OUT = "decision", "held-out.npy"
EVALUATION = "evaluation"
METRICS, CZ_BENCHMARKS = "metrics.json", "cz-benchmarks.json"
COMPARISON, COMPARISON_RECORD = "comparison", "comparison.json"
REPORT = "report.html"
SEARCH = "search"
# Files of a stage in its staging folder, in addition to the unfinished results.
FINGERPRINT = "fingerprint.json"
PROGRESS = "progress.json"
# Of a stage in parts: the number of parts, the locks of those that begin, and of the command that starts them; of each
# part its lock, and whether it is done.
PARTS = "parts.json"
PARTS_LOCK, COMMAND_LOCK = ".parts.lock", ".command.lock"
PART_LOCK, PART_DONE = "part.lock", "part.done"
LOGS = "logs"
# Of prepare: what the parts select cells and genes from, and the number of genes that were excluded beforehand.
SELECTION, EXCLUDED_GENES, GENES_LOCK = "selection", "selection.json", "genes.lock"
CHECKPOINT = "checkpoint.ckpt"
FIRST_PROCESS = "first-process.json"
VARIANCE = "variance.npy"
LIBRARY_SIZE = "library_size.npy"
PART = "part-{:05d}.h5ad"
# In the file of prepared cells: obs columns, proteins in obsm, their names in uns.
BATCH, LABELS = "batch", "labels"
PROTEINS, PROTEIN_NAMES = "protein_expression", "protein_names"

OWNED = frozenset(
    {
        MANIFEST, LOCK, STAGING, GENES, TENSORBOARD, LATENT, LATENT_JOINIDS, LATENT_HASHES, MINIFIED, QA, PUBLISHED,
        EVALUATION, METRICS, CZ_BENCHMARKS, REPORT, COMPARISON, SEARCH, FINGERPRINT, PROGRESS, CHECKPOINT, VARIANCE,
        LIBRARY_SIZE, SEEN_CELLS, DECISION, PARTS, PARTS_LOCK, COMMAND_LOCK, PART_LOCK, PART_DONE, GENES_LOCK, LOGS,
        SELECTION, EXCLUDED_GENES, INDEX,
    }
)  # fmt: skip
_PART = re.compile(re.escape(PART).replace(r"\{:05d\}", r"\d{5,}"))
# Text that `files.parts` inserts into the names of files of a part.
_OF_PART = re.compile(r"-\d{5,}-of-\d{5,}")
# Together with an ending of 55 bytes, this is the limit of most file systems (255 bytes).
_MOST_BYTES = 200


def same_name(name: str) -> str:
    """Normalise a name, so that names of the same file are equal if a file system ignores case and Unicode forms."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name).casefold())


def is_owned(name: str) -> bool:
    """Whether the name is reserved for files and folders of the run directory."""
    folded = same_name(name)
    return _OF_PART.sub("", folded) in OWNED or _PART.fullmatch(folded) is not None or _is_temporary(folded)


def _is_temporary(folded: str) -> bool:
    """Whether the name is a temporary name of a file that is being written or replaced."""
    return folded.endswith((".partial", ".old"))


def unfit_name(name: str) -> str | None:
    """Reason why a setting cannot use this name for a file in the run directory; None if it can."""
    if not name.strip() or {"/", "\\"} & set(name):
        return "expected the name of a file, without / and \\"
    if name in (".", ".."):
        return "expected the name of a file; this is a folder itself"
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        return "the name of a file cannot contain control characters"
    if name != name.strip() or name.endswith("."):
        return "the name of a file cannot begin or end with a space, or end with a dot"
    if len(name.encode()) > _MOST_BYTES:
        return f"the name of a file can have {_MOST_BYTES} bytes, this one has {len(name.encode()):,}"
    if is_owned(name):
        return "the run directory uses this name for its own files or for unfinished files"
    return None


def check_places(
    directory: str,
    names: tuple[str, str],
    *,
    census: str | None,
    experiment: str | None,
    evaluation: str | None,
    comparison: str | None,
    mapped: str | None,
    published: str | None,
) -> None:
    """ValueError if a setting would overwrite files of the run directory, the Census or the Experiment.

    Parameters
    ----------
    directory
        The run directory.
    names
        Names of the prepared cells and of the model in the run directory.
    census, experiment, evaluation, comparison, mapped, published
        Settings `census.uri`, `publish.experiment_uri`, `evaluate.folder`, `compare_releases.folder`, `query.output`
        and `publish.model_uri`.
    """
    run = Path(os.path.realpath(directory))
    if census is not None and run == _real(census):
        raise ValueError(f"output.directory {directory} is the Census; give another folder")
    if published is not None and (model := _real(published)) is not None:
        if model in (run, *run.parents):
            raise ValueError(
                f"publish.model_uri {published} contains the run directory {directory}; give another folder"
            )
        for setting, read in (("census.uri", census), ("publish.experiment_uri", experiment)):
            stored = None if read is None else _real(read)
            if stored is not None and (model in (stored, *stored.parents) or stored in model.parents):
                raise ValueError(f"publish.model_uri {published} would overwrite {setting} {read}; give another folder")
    taken = {same_name(name) for name in names}
    places: list[tuple[str, str | None, str | None]] = [("query.output", file, None) for file in _files_of(mapped)]
    places += [("evaluate.folder", evaluation, EVALUATION), ("compare_releases.folder", comparison, COMPARISON)]
    places += [("publish.model_uri", published, PUBLISHED)]
    for setting, written, own in places:
        place = None if written is None else _real(written)
        if place is None or run not in place.parents or (own and place == run / own):
            continue
        first = place.relative_to(run).parts[0]
        if is_owned(first) or same_name(first) in taken:
            raise ValueError(
                f"{setting} writes {written}, and {first} is a name that the run uses itself; choose another"
            )


def _files_of(mapped: str | None) -> list[str]:
    """Files that map-query writes for `query.output`: the .h5ad, the report and the figure."""
    if mapped is None or not Path(mapped).name:
        return []
    return [mapped, *(str(Path(mapped).with_suffix(end)) for end in (".json", ".png"))]


def _real(place: str) -> Path | None:
    """Real path of a local location; None for a remote URL."""
    path = local_path(place)
    return None if path is None else Path(os.path.realpath(path))
