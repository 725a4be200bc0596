"""Every key is checked before work starts, and answered in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from census_scvi.cli import main
from census_scvi.config import Config, digest, flatten, load_config
from census_scvi.errors import UserError

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


def config_file(folder: Path, text: str = "") -> Path:
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
        ("training_plan.lr=fast", "training_plan.lr is 'fast', expected float"),
        ("training_plan.kl_weight=1", "training_plan.kl_weight cannot be set here; set training_plan.max_kl_weight"),
        ("training_plan={n_epochs_kl_warmup: 1, n_steps_kl_warmup: 2}", "sets both n_epochs_kl_warmup and n_steps_kl"),
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
        ("just text", "expected sections such as census, hvg and model, found str"),
        ("", "expected sections such as census, hvg and model, found NoneType"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_config(config_file(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; expected a YAML of sections such as census"):
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
    assert main(stage, ["--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as stopped:
        main(stage, ["--help"])
    assert stopped.value.code == 0
    assert "section.key=value" in capsys.readouterr().out


@given(st.dictionaries(st.text(), st.integers() | st.lists(st.text())))
def test_digest_does_not_depend_on_the_order_of_keys(values: dict) -> None:
    assert digest(values) == digest(dict(reversed(values.items())))
