"""Every key is checked before work starts, and answered in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from census_scvi.cli import main
from census_scvi.config import messages, run_names
from census_scvi.config.flat import digest, flatten
from census_scvi.errors import UserError
from census_scvi.files.paths import expand
from census_scvi.settings import Config, load_config

ROOT = Path(__file__).parents[1]

# The file as the Census team published it, word for word in its keys and values.
PUBLISHED = """
census:
  organism:
    "homo_sapiens"
  obs_query: # Use if you want to train on a subset of the model
    null
  obs_query_model:
    'is_primary_data == True and nnz >= 300'
hvg:
  top_n_hvg:
    8000
  hvg_batch:
    [suspension_type, assay]
anndata:
  batch_key:
    [dataset_id, assay, suspension_type, donor_id]
  model_filename:
    anndata_model.h5ad
model:
  filename: "scvi.model"
  n_hidden: 512
  n_latent: 50
  n_layers: 1
train:
  max_epochs: 100
  batch_size: 1024
  train_size: 0.9
  early_stopping: False
  multi_gpu: False
  num_workers: 4
  devices: [0, 1, 2, 3]
training_plan:
  lr: 1.0e-4
  n_epochs_kl_warmup: 20
  max_kl_weight: 1
"""


# A few lines that stand for ten million values, and for a list nested a hundred deep.
BOMB = "l0: &l0 [a]\n" + "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 8))
CHAIN = "l0: &l0 [a]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}]\n" for n in range(1, 100))


def config_file(folder: Path, text: str = "{}") -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_published_file_is_valid_unchanged(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, PUBLISHED))
    values = yaml.safe_load(PUBLISHED)
    ours = flatten(config.model_dump())
    assert {key: ours[key] for key in flatten(values)} == flatten(values)


@pytest.mark.parametrize(
    "file", [ROOT / "scvi-config.yaml", *sorted((ROOT / "configs").glob("[!b]*.yaml"))], ids=lambda f: f.name
)
def test_shipped_files_are_valid(file: Path) -> None:
    load_config(file)


def test_shipped_config_has_the_published_values() -> None:
    config = load_config(ROOT / "scvi-config.yaml")
    published = flatten(yaml.safe_load(PUBLISHED)) | {"model.n_layers": 2}
    ours = flatten(config.model_dump())
    assert {key: ours[key] for key in published} == published


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(config_file(tmp_path, "census:\nmodel:\ntraining_plan:\n")) == Config()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.n_hiden=512", "command line: model.n_hiden is not a setting; did you mean model.n_hidden?"),
        ("model.batch_size=5", "command line: model.batch_size is not a setting; did you mean train.batch_size?"),
        ("evaluate.label=[x]", "evaluate.label is not a setting; did you mean evaluate.labels?"),
        ("modle.n_hidden=5", "modle is not a setting; did you mean model?"),
        ("n_latent=5", "n_latent is not a setting; did you mean model.n_latent?"),
        ("model.n_hidden=big", "model.n_hidden is 'big', expected a whole number"),
        ("model.n_hidden=1.5", "model.n_hidden is 1.5, expected a whole number"),
        ("model.n_hidden=true", "model.n_hidden is True, expected a whole number"),
        ("model.n_hidden=0", "model.n_hidden is 0: should be greater than or equal to 1"),
        ("model.dropout_rate=1", "model.dropout_rate is 1: should be less than 1"),
        ("model.gene_likelihood=nbb", "model.gene_likelihood is 'nbb': should be 'nb', 'zinb' or 'poisson'"),
        ("model=3", "model is 3, expected a section of keys"),
        ("hvg.hvg_batch=assay", "hvg.hvg_batch is 'assay', expected a list such as [a, b]"),
        ("anndata.batch_key=[]", "anndata.batch_key is empty"),
        ("anndata.model_filename=../x.h5ad", "anndata.model_filename is '../x.h5ad'"),
        ("anndata.model_filename=scvi.model", "are both 'scvi.model'"),
        ("publish.name=a/b", "publish.name is 'a/b': expected letters, digits"),
        ("train.devices=all", "expected a number of devices, a list of device indices such as [0, 1], or auto"),
        ("train.batch_size=1", "train.batch_size is 1: should be greater than or equal to 2"),
        ("train.early_stopping=yes please", "train.early_stopping is 'yes please', expected true or false"),
        ("train.trainer={gradient_clip_vall: 1}", "train.trainer.gradient_clip_vall is not an argument of Lightning's"),
        ("train.trainer={gradient_clip_vall: 1}", "did you mean gradient_clip_val?"),
        ("train.trainer={max_epochs: 1}", "train.trainer.max_epochs cannot be set here; set train.max_epochs"),
        ("training_plan.learning_rate=1", "training_plan.learning_rate is not an argument of scvi-tools' TrainingPlan"),
        ("training_plan.lr=fast", "training_plan.lr is 'fast', expected a number"),
        ("training_plan.kl_weight=1", "training_plan.kl_weight cannot be set here; set training_plan.max_kl_weight"),
        ("training_plan={n_epochs_kl_warmup: 1, n_steps_kl_warmup: 2}", "sets both n_epochs_kl_warmup and n_steps_kl"),
        ("train.trainer={gradient_clip_val: a}", "gradient_clip_val is 'a', expected a number or null"),
        ("training_plan.reduce_lr_on_plateau=5", "training_plan.reduce_lr_on_plateau is 5, expected true or false"),
        ("model.n_hidden.x=5", "command line: model.n_hidden is {'x': 5}, expected a whole number"),
        ("gates.waived={order: ''}", "command line: gates.waived.order is '', expected text that is not empty"),
        ("seed=-1", "seed is -1: should be greater than or equal to 0"),
        ("n_hidden", "command line: 'n_hidden' is not a setting; expected section.key=value"),
        ("model.n_hidden=[", "the value is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file(tmp_path, "model: {}"), [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = config_file(tmp_path, "model:\n  n_hiden: 5\n")
    with pytest.raises(UserError, match="n_hiden is not a setting") as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_early_stopping_needs_validation_cells(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"early_stopping needs validation cells and train\.train_size is 1\.0"):
        load_config(config_file(tmp_path, "train: {early_stopping: true, train_size: 1.0}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {n_hidden: 1, n_hidden: 2}", "line 1: not valid YAML: n_hidden is set twice"),
        ("model:\n  - n_hidden: [", "not valid YAML"),
        ("just text", "expected sections such as census, hvg and model, found text"),
        ("", "expected sections such as census, hvg and model, found an empty file"),
        ("# a comment\n", "found an empty file"),
        ("- model", "found a list"),
        ("census:\n  uri: {{ uri }}", "line 2: not valid YAML: a key is a list or a mapping itself; was a template"),
        ("census:\n  ? [a, b]\n  : c", "line 2: not valid YAML: a key is a list or a mapping itself"),
        ("census: " + "[" * 3000, "line 1: not valid YAML: lists or mappings are nested more than 50 deep"),
        ("census:\n" + "{a: " * 100_000, "line 2: not valid YAML"),
        ("census:\n" + " [\n" * 500, "line 51: not valid YAML: lists or mappings are nested more than 50 deep"),
        ("- " * 5000, "line 1: not valid YAML: lists or mappings are nested more than 50 deep"),
        (BOMB, "not valid YAML: aliases stand for more than 100,000 values"),
        (CHAIN, "not valid YAML: aliases stand for more than 100,000 values, or 50 levels"),
        ("model: &m\n  a: *m", "line 1: not valid YAML: an anchor is used within itself"),
        ("model: *m", "line 1: not valid YAML: found undefined alias 'm'"),
        ("model:\n\tn_hidden: 5", "line 2: not valid YAML: a tab; indent with spaces"),
        ("model: {}\nseed: 1\x07", "line 2: not valid YAML: a character that YAML does not allow (U+0007)"),
        ("model: !!python/object/apply:os.system [ls]", "line 1: not valid YAML: !!python/object/apply:os.system"),
        ("seed: !!int abc", "line 1: not valid YAML: !!int 'abc' cannot be read"),
        ("<<: 5", "line 1: not valid YAML: << merges a mapping, or a list of mappings"),
        ("model: {a: 1}\n---\nmodel: {a: 1}", "line 2: not valid YAML: but found another document"),
        ("model: {n_hidden: 5", "line 1: not valid YAML"),
        ("1: 2\n'1': 3", "line 2: not valid YAML: 1 is set twice"),
    ],
    ids=range(24),
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = config_file(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"model:\n  filename: mod\xe8le\n", " line 2: not text in UTF-8 (byte 0xe8); save the file as UTF-8"),
        (b"\x89HDF\r\n\x1a\n", " line 1: not text in UTF-8 (byte 0x89)"),
        (b"\xff\xfem", " line 1: not text in UTF-8"),
        (None, " is a folder; expected a YAML file of sections such as census"),
        (b"#" * 10_000_001, " has 10 MB; expected a YAML file of sections"),
    ],
    ids=["latin-1", "hdf5", "half a character", "folder", "large"],
)
def test_a_file_that_is_no_text(data: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_of_any_editor(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("publish:\r\n  title: Zellen für München\r\n".encode(encoding))
    assert load_config(path).publish.title == "Zellen für München"


WRITTEN = [
    "010", "1.10", "1_0", "12:30:45", "2:00", "2024-01-01", "no", "on", "Yes", "y", "true", "False", "0x1F", "0o10",
    "1e3", ".5", "+1", ".inf", "-.inf", ".nan", "0b1", "1,000", "=", "1.", "007", "a#b", "don't", "~x", "nullable",
]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_a_text_setting_is_what_was_written(text: str, tmp_path: Path) -> None:
    values = f"publish: {{title: {text}}}\nhvg:\n  hvg_batch: [{text}]\ngates:\n  waived: {{order: {text}}}"
    config = load_config(config_file(tmp_path, values if "," not in text else "{}"), [f"publish.description={text}"])
    assert config.publish.description == text
    if "," not in text:
        assert (config.publish.title, config.hvg.hvg_batch, config.gates.waived) == (text, [text], {"order": text})


@pytest.mark.parametrize("text", ["null", "~", "Null", "NULL", ""])
def test_null_stays_null(text: str, tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, f"evaluate:\n  donors: {text}\n  obs_filter: {text}"))
    assert (config.evaluate.donors, config.evaluate.obs_filter) == (None, None)
    assert load_config(config_file(tmp_path, f"evaluate: {{donors: '{text or '~'}'}}")).evaluate.donors == (text or "~")


@pytest.mark.parametrize(
    ("text", "seed"), [("010", 10), ("+5", 5), ("0o10", 8), ("0x10", 16), ("00", 0), ("4294967295", 2**32 - 1)]
)
def test_whole_numbers_follow_the_core_rules_of_yaml(text: str, seed: int, tmp_path: Path) -> None:
    assert load_config(config_file(tmp_path, f"seed: {text}")).seed == seed
    assert load_config(config_file(tmp_path), [f"seed={text}"]).seed == seed


@pytest.mark.parametrize("text", ["1_0", "2:00", "0b1", "1e3", "ten", "1 0", "0o8", "1" * 5000, "true", "'5'"])
def test_what_is_no_whole_number_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seed is .*, expected a whole number") as caught:
        load_config(config_file(tmp_path, f"seed: {text}"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1.e-3", 0.001), (".5e+0", 0.5), ("1", 1.0), ("05.0", 5.0), ("1E1", 10.0)]
)
def test_numbers_follow_the_core_rules_of_yaml(text: str, value: float, tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, f"train:\n  checkpoint_minutes: {text}\ntraining_plan: {{lr: {text}}}"))
    assert config.train.checkpoint_minutes == config.training_plan["lr"] == value
    assert isinstance(config.train.checkpoint_minutes, float)


@pytest.mark.parametrize("text", [".inf", ".nan", "-.INF"])
def test_a_number_is_finite(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gates\.max_difference is .*: should be"):
        load_config(config_file(tmp_path, f"gates: {{max_difference: {text}}}"))


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("On", True), ("TRUE", True), ("no", False), ("off", False)]
)
def test_true_and_false(text: str, value: bool, tmp_path: Path) -> None:
    assert load_config(config_file(tmp_path, f"publish:\n  replace: {text}")).publish.replace is value


def test_free_mappings_get_values_of_yaml(tmp_path: Path) -> None:
    trainer = "{gradient_clip_val: 1e-3, max_time: 00:05:00, limit_val_batches: 010, deterministic: true, profiler: no}"
    config = load_config(config_file(tmp_path, f"train:\n  trainer: {trainer}\n  devices: auto"))
    assert config.train.trainer == {
        "gradient_clip_val": 0.001, "max_time": "00:05:00", "limit_val_batches": 10, "deterministic": True,
        "profiler": "no",
    }  # fmt: skip
    assert load_config(config_file(tmp_path, "train: {devices: [0, 01]}")).train.devices == [0, 1]


def test_merge_keys(tmp_path: Path) -> None:
    text = """
model: &small {n_hidden: 5, n_latent: 3}
train:
  trainer: &trainer {gradient_clip_val: 1.5, max_time: 00:05:00}
training_plan: &plan {lr: 1e-3, weight_decay: 1e-6}
"""
    config = load_config(config_file(tmp_path, text + "publish: {contact: {<<: {name: A, email: b}, email: c}}"))
    assert (config.publish.contact.name, config.publish.contact.email) == ("A", "c")
    merged = "training_plan: {<<: [{lr: 1, eps: 2}, {lr: 3, weight_decay: 4}], eps: 5}"
    assert load_config(config_file(tmp_path, merged)).training_plan == {"lr": 1, "eps": 5, "weight_decay": 4}


@given(text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_what_is_dumped_is_read_back(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = config_file(tmp_path_factory.mktemp("dump"), yaml.safe_dump({"publish": {"title": text}, "seed": 3}))
    config = load_config(path)
    assert (config.publish.title, config.seed) == (text, 3)


def test_the_command_line_has_no_comments(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path), ["publish.title=Atlas #2", "publish.description=#2", "seed = 4"])
    assert (config.publish.title, config.publish.description, config.seed) == ("Atlas #2", "#2", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("census.uri: x", "census.uri is not a setting; in a file, write it as census: {uri: ...}"),
        ("census.tiledb.vfs.s3.region: x", "write it as census: {tiledb: {vfs: {s3: {region: ...}}}}"),
        ("publish.contact.name: x", "not a setting; in a file, write it as publish: {contact: {name: ...}}"),
        ("training_plan.lr: 1", "training_plan.lr is not a setting; in a file, write it as training_plan: {lr: ...}"),
        ("model: {model.n_hidden: 1}", "in a file, write it as model: {n_hidden: ...}"),
        ("census.urii: x", "census.urii is not a setting; did you mean census.uri?"),
        ("null: 4", ": null is not a setting"),
        ("1: 4", ": 1 is not a setting"),
        ("true: 4", ": true is not a setting"),
        ("'': 4", ": '' is not a setting"),
        ("'n hidden': 4", ": 'n hidden' is not a setting; did you mean model.n_hidden?"),
        ("model: {n_hidden 5}", ": 'model.n_hidden 5' is not a setting; did you mean model.n_hidden?"),
        ("Model: {n_hidden: 5}", ": Model is not a setting; did you mean model?"),
        ("output: {directory: ~}", "output.directory is null, expected text"),
        ("model:\n- n_hidden: 5", "model is [{'n_hidden': 5}], expected a section of keys"),
    ],
)
def test_a_key_that_is_no_setting(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [*messages.setting_names(Config), "nothing", "census", "a.b", "n_hidden"])
def test_no_hint_repeats_what_was_written(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file(tmp_path, json.dumps({key + ".x": 1})))
    assert f"did you mean {key}.x?" not in str(caught.value)


NAMES = ["anndata.model_filename", "model.filename"]


@pytest.mark.parametrize("setting", NAMES)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        *[(name, "the run directory uses this name") for name in sorted(run_names.OWNED)],
        ("LATENT.NPY", "the run directory uses this name"),
        ("Published", "the run directory uses this name"),
        ("part-00000.h5ad", "the run directory uses this name"),
        ("cells.partial", "or for unfinished files"),
        ("cells.OLD", "or for unfinished files"),
        ("manifest.json.partial", "or for unfinished files"),
        ("..", "this is a folder itself"),
        (".", "this is a folder itself"),
        ("a/b", "without / and"),
        ("a\\b", "without / and"),
        (" ", "expected the name of a file"),
        ("cells ", "cannot begin or end with a space"),
        (" cells", "cannot begin or end with a space"),
        ("cells.", "or end with a dot"),
        ("ce\x00lls", "control characters"),
        ("ce\nlls", "control characters"),
        ("ce\ud800lls", "control characters"),
        ("x" * 201, "can have 200 bytes, this one has 201"),
        ("é" * 101, "can have 200 bytes, this one has 202"),
    ],
)
def test_a_name_that_a_run_cannot_use(setting: str, name: str, words: str, tmp_path: Path) -> None:
    section, key = setting.split(".")
    with pytest.raises(UserError) as caught:
        load_config(config_file(tmp_path, json.dumps({section: {key: name}})))
    assert f"{setting} is " in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["cells.h5ad", ".cells", "my cells #1?.h5ad", "Zellen-München", "x" * 200, "part.h5ad"]
)
def test_a_name_that_a_run_can_use(name: str, tmp_path: Path) -> None:
    values = {"anndata": {"model_filename": name}, "model": {"filename": "other"}}
    assert load_config(config_file(tmp_path, json.dumps(values))).anndata.model_filename == name


@pytest.mark.parametrize(
    ("one", "other"), [("a.h5ad", "a.h5ad"), ("cells", "Cells"), ("caf\u00e9", "cafe\u0301"), ("straße", "STRASSE")]
)
def test_two_names_that_some_file_systems_take_for_one(one: str, other: str, tmp_path: Path) -> None:
    values = {"anndata": {"model_filename": one}, "model": {"filename": other}}
    with pytest.raises(UserError, match=r"anndata\.model_filename and model\.filename are (both|the same name)"):
        load_config(config_file(tmp_path, json.dumps(values)))


@pytest.mark.parametrize(
    ("setting", "place", "words"),
    [
        ("evaluate.folder", "run/scvi.model", "evaluate.folder writes run/scvi.model, and scvi.model is a name that"),
        ("evaluate.folder", "run/published/x", "published is a name that the run uses itself"),
        ("evaluate.folder", "./run/../run/tb_logs", "tb_logs is a name that the run uses itself"),
        ("query.output", "run/anndata_model.h5ad", "anndata_model.h5ad is a name that the run uses itself"),
        ("query.output", "run/manifest.h5ad", "query.output writes run/manifest.json"),
        ("query.output", "run/LATENT.npy", "LATENT.npy is a name that the run uses itself"),
        ("publish.model_uri", "run", "publish.model_uri run contains the run directory run"),
        ("publish.model_uri", ".", "contains the run directory run"),
        ("publish.model_uri", "file://{here}/run/latent.npy", "latent.npy is a name that the run uses itself"),
        ("publish.model_uri", "file://localhost{here}/run/latent.npy", "latent.npy is a name that the run uses itself"),
        ("publish.model_uri", "FILE://{here}/run/latent.npy", "latent.npy is a name that the run uses itself"),
        ("publish.model_uri", "run/evaluation", "evaluation is a name that the run uses itself"),
        ("publish.model_uri", "census", "publish.model_uri census would overwrite census.uri census; give another"),
        ("publish.model_uri", "census/census_data", "would overwrite census.uri census"),
        ("publish.model_uri", "data", "would overwrite publish.experiment_uri data/census/mouse"),
        ("publish.model_uri", "data/models", None),
        ("census.uri", "run/.", "output.directory run is the Census; give another folder"),
        ("compare_releases.folder", "run/published/x", "published is a name that the run uses itself"),
        ("compare_releases.folder", "run/comparison", None),
        ("evaluate.folder", "run", None),
        ("evaluate.folder", "run/evaluation", None),
        ("evaluate.folder", "run/evaluation-2", None),
        ("evaluate.folder", "elsewhere/published", None),
        ("query.output", "run/mapped.h5ad", None),
        ("publish.model_uri", "run/published", None),
        ("publish.model_uri", "s3://run/latent.npy", None),
        ("census.uri", "run/census", None),
    ],
)
def test_a_place_in_the_run_directory(
    setting: str, place: str, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["census.uri=census", "publish.experiment_uri=data/census/mouse"]
    settings += [f"{setting}={place.format(here=tmp_path)}"]
    if words is None:
        load_config(config_file(tmp_path), settings)
        return
    with pytest.raises(UserError) as caught:
        load_config(config_file(tmp_path), settings)
    assert words in str(caught.value)


PLACES = [
    "census.uri", "output.directory", "publish.experiment_uri", "publish.model_uri", "query.file", "query.output",
    "query.model", "query.embedding", "evaluate.folder", "evaluate.embeddings.mine",
    "compare_releases.old",
]  # fmt: skip


@pytest.mark.parametrize(("home", "path", "expected"), [("/", "~/x", "/x"), ("/", "~", "/"), ("/a/", "~/x", "/a/x")])
def test_a_home_that_ends_in_a_slash(home: str, path: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    assert expand(path) == expected


@pytest.mark.parametrize("setting", PLACES)
def test_home_folders_and_variables_in_every_place(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there$NOWHERE").mkdir()
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/$HOME")  # what a variable holds is taken as it is
    monkeypatch.setenv("BUCKET", "cells")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")

    def value(written: str) -> str:
        config = load_config(config_file(tmp_path), [f"{setting}={written}"])
        return str(flatten(config.model_dump())[setting])

    written = {
        "~": "/home/me", "~/x/~y": "/home/me/x/~y", "./~": "./~", "a/~/b": "a/~/b",
        "~root/x": str(Path("~root/x").expanduser()),
        "$SCRATCH/run": "/scratch/$HOME/run", "${BUCKET}s/x$": "cellss/x$",
        "~/$BUCKET-$5": "/home/me/cells-$5", "a$$BUCKET": "a$BUCKET", "there$NOWHERE/x": "there$NOWHERE/x",
    }  # fmt: skip
    if setting not in ("output.directory", "query.file", "query.output", "evaluate.folder"):
        written["s3://$BUCKET/~x"] = "s3://cells/~x"
    for text, expanded in written.items():
        assert value(f"'{text}'") == expanded
    for text, words in {
        "$NOWHERE/x": "the environment variable NOWHERE is not set",
        "x/${EMPTY}": "the environment variable EMPTY is empty",
        "~nobody-here/x": "there is no user 'nobody-here'; for a folder of that name write ./~nobody-here",
        "${BUCKET:-x}": "${BUCKET:-x} is not an environment variable; write ${NAME}",
        "${BUCKET": "${BUCKET is not an environment variable; write ${NAME}",
        "${}": "${} is not an environment variable",
    }.items():
        with pytest.raises(UserError) as caught:
            value(f"'{text}'")
        assert f"{setting} is '{text}': {words}" in str(caught.value)


def test_home_folders_in_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config_file(tmp_path, "model: {n_hiden: 1}")
    assert main("prepare", ["--config", "~/c.yaml"]) == 2
    assert f"{tmp_path}/c.yaml: model.n_hiden is not a setting" in capsys.readouterr().err
    assert main("train", ["--config", "$NOWHERE/c.yaml"]) == 2
    assert "--config is '$NOWHERE/c.yaml': the environment variable NOWHERE is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        "anndata.batch_key", "anndata.obs_columns", "hvg.hvg_batch", "query.labels", "evaluate.labels",
        "evaluate.batches",
    ],
)  # fmt: skip
def test_a_column_that_is_named_twice(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file(tmp_path), [f"{setting}=[assay, donor_id, assay]"])
    assert f"{setting} is ['assay', 'donor_id', 'assay']: names 'assay' twice; name it once" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--verbose"], "unrecognized arguments: --verbose"),
        (["--model.n_hidden=5"], "settings have no dashes: section.key=value"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main("prepare", arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in error
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["model.n_hiden=1", "--force", "seed=1", "--config", "FILE", "seed=2"],
        ["--config", "FILE", "model.n_hiden=1", "--dry-run", "seed=2"],
        ["model.n_hiden=1", "seed=1", "--config=FILE", "--force"],
    ],
)
@pytest.mark.parametrize("stage", ["prepare", "train", "create-latent-update", "publish", "map-query", "evaluate"])
def test_arguments_in_any_order(
    stage: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config_file(tmp_path, "model: {}"))
    assert main(stage, [argument.replace("FILE", path) for argument in arguments]) == 2
    assert "command line: model.n_hiden is not a setting; did you mean model.n_hidden?" in capsys.readouterr().err


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; expected a YAML file of sections such as census"):
        load_config(tmp_path / "absent.yaml")


def test_numbers_and_versions_read_as_people_write_them(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, "census: {version: 2025-11-08}\ntraining_plan: {lr: 1e-4}"))
    assert config.census.version == "2025-11-08"
    assert config.training_plan["lr"] == 1e-4


def test_overrides_win_and_other_keys_stay(tmp_path: Path) -> None:
    path = config_file(tmp_path, "model: {n_hidden: 5, n_latent: 7}")
    config = load_config(path, ["model.n_hidden=6", "train.trainer.gradient_clip_val=1.5"])
    assert (config.model.n_hidden, config.model.n_latent) == (6, 7)
    assert config.train.trainer == {"gradient_clip_val": 1.5}


def test_a_config_error_is_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from census_scvi.cli import main;"
        f"code = main('train', ['--config', {str(config_file(tmp_path, 'model: 1'))!r}]);"
        "heavy = {'torch', 'scvi', 'tiledbsoma', 'numpy', 'pandas', 'lightning', 'anndata'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", ["prepare", "train", "create-latent-update"])
def test_exit_codes_and_help(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.yaml"
    assert main(stage, ["--config", str(path)]) == 2
    expected = f"error: {path}: no such file; give the YAML file with your settings: --config FILE"
    assert capsys.readouterr().err.strip() == expected
    with pytest.raises(SystemExit) as stopped:
        main(stage, ["--help"])
    assert stopped.value.code == 0
    assert "section.key=value" in capsys.readouterr().out


@given(st.dictionaries(st.text(), st.integers() | st.lists(st.text())))
def test_digest_does_not_depend_on_the_order_of_keys(values: dict) -> None:
    assert digest(values) == digest(dict(reversed(values.items())))


def written(folder: Path, **files: str) -> Path:
    """Files NAME.yaml in a folder; the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").parent.mkdir(exist_ok=True, parents=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_file_holds_what_differs_from_those_it_extends(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        **{
            "mouse": "extends: shared/middle.yaml\ncensus: {organism: mus_musculus}\nhvg: {hvg_batch: [assay]}\n"
            "model:\ntrain: {trainer: null}\ntraining_plan: {lr: 3e-3}",
            "shared/middle": "extends: ../base.yaml\nseed: 2\nmodel: {n_hidden: 7}",
            "base": "seed: 1\nmodel: {n_hidden: 5, n_latent: 3}\ntraining_plan: {lr: 1, weight_decay: 1e-6}\n"
            "hvg: {hvg_batch: [donor_id, tissue], top_n_hvg: 9}\ntrain: {trainer: {gradient_clip_val: 1}}",
        },
    )
    config = load_config(path, ["model.n_latent=4", "training_plan.eps=1e-8"])
    assert (config.seed, config.model.n_hidden, config.model.n_latent) == (2, 7, 4)
    assert (config.census.organism, config.hvg.hvg_batch, config.hvg.top_n_hvg) == ("mus_musculus", ["assay"], 9)
    assert config.training_plan == {"lr": 3e-3, "weight_decay": 1e-6, "eps": 1e-8}
    assert config.train.trainer is None


@pytest.mark.parametrize(
    ("child", "base", "overrides", "message"),
    [
        ("{}", "model: {n_hiden: 5}", [], "base.yaml: model.n_hiden is not a setting"),
        ("model: {n_hiden: 6}", "model: {n_hiden: 5}", [], "child.yaml: model.n_hiden is not a setting"),
        ("model: {n_hidden: big}", "model: {n_hidden: 5}", [], "child.yaml: model.n_hidden is 'big'"),
        ("model: {n_latent: 5}", "model: {n_hidden: big}", [], "base.yaml: model.n_hidden is 'big'"),
        ("{}", "model: {n_hidden: 5}", ["model.n_hidden=x"], "command line: model.n_hidden is 'x'"),
        ("{}", "census.uri: x", [], "base.yaml: census.uri is not a setting; in a file"),
        ("seed: 1", "seed: 1\nmodel: 3", [], "base.yaml: model is 3, expected a section of keys"),
        ("training_plan: {lr: 1}", "training_plan: {rate: 1}", [], "base.yaml: training_plan.rate is not an argument"),
        ("training_plan: {rate: 1}", "training_plan: {lr: 1}", [], "child.yaml: training_plan.rate is not an argument"),
        ("train: {train_size: 1.0}", "train: {early_stopping: true}", [], "base.yaml: train.early_stopping needs"),
        ("seed: 1", "seed: 2", ["publish.name=a/b"], "command line: publish.name is 'a/b'"),
        ("seed: 1", "a: {b: 1", [], "base.yaml line 1: not valid YAML"),
    ],
)
def test_an_error_names_the_file_in_which_the_wrong_key_stands(
    child: str, base: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, child=f"extends: base.yaml\n{'' if child == '{}' else child}", base=base)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert message in str(caught.value)
    assert str(caught.value).startswith("command line" if overrides else str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a.yaml"}, "a.yaml: extends a.yaml, which extends it, too; remove one of the two lines"),
        (
            {"a": "extends: b.yaml", "b": "extends: c.yaml", "c": "extends: ./b.yaml"},
            "c.yaml: extends b.yaml, which extends it, too",
        ),
        ({"a": "extends: b.yaml"}, "a.yaml: extends b.yaml: no such file; the path is relative to"),
        ({"a": "extends: [b.yaml]"}, "a.yaml: extends is not a path; expected one YAML file, as in extends: base.yaml"),
        ({"a": "extends:"}, "a.yaml: extends is not a path"),
        ({"a": "extends: $NOWHERE/b.yaml"}, "a.yaml: extends is '$NOWHERE/b.yaml': the environment variable NOWHERE"),
        ({"a": "extends: .."}, "is a folder; expected a YAML file"),
    ],
)
def test_a_file_that_cannot_be_extended(
    files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, **files)
    with pytest.raises(UserError) as caught:
        load_config(path.name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_line_extends_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"command line: extends can only be set in a file"):
        load_config(config_file(tmp_path), ["extends=other.yaml"])


def test_the_mouse_config_differs_from_the_human_one_in_organism_and_directory() -> None:
    human, mouse = (
        flatten(load_config(ROOT / name).model_dump()) for name in ("scvi-config.yaml", "configs/mus_musculus.yaml")
    )
    assert {key for key in human if human[key] != mouse[key]} == {"census.organism", "output.directory"}
