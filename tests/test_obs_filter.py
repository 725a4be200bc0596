"""Value filters: what they find is what pandas finds, and what cannot be used is one line, never a crash."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Run

from census_scvi.census.cells import matching_joinids, select_cells
from census_scvi.census.open import open_census
from census_scvi.census.settings import CensusSection
from census_scvi.config.obs_filter import FilterError, parse_filter, usable_filter

Mask = Callable[[pd.DataFrame], "pd.Series[bool]"]

# Every type of column, with and without missing values: (values, type).
COLUMNS = {
    "whole": ([0, 1, 2, 3, 317, 318, -7, 2], pa.int64()),
    "small": ([-5, -1, 0, 1, 2, 127, -128, 2], pa.int8()),
    "short": ([0, 1, 2, 3, 317, 318, -7, 2], pa.int16()),
    "count": ([0, 1, 2, 3, 4, 255, 7, 2], pa.uint8()),
    "share": ([0, 0.5, 1, 1.5, 2, -3, 0.1, 2], pa.float32()),
    "value": ([0, 0.1, 1, 1.5, 2, -3, 1e300, 2], pa.float64()),
    "flag": ([True, False] * 4, pa.bool_()),
    "text": (["a", "b", "c", "", "é", "A", "it's", "b"], pa.large_string()),
    "label": (["a", "b", "c", "", "é", "A", "a b", "b"], pa.dictionary(pa.int32(), pa.large_string())),
    "some_whole": ([1, None, 3, None, 5, 6, 7, 2], pa.int64()),
    "some_text": (["a", None, "b", None, "c", "", "d", "b"], pa.large_string()),
    "some_label": (["a", None, "b", None, "c", "", "d", "b"], pa.dictionary(pa.int32(), pa.large_string())),
}
NUMBERS = ["whole", "small", "short", "count", "share", "value", "some_whole"]
LABELS = ["text", "label", "some_text", "some_label"]
WHOLE = ["whole", "small", "short", "count", "some_whole"]


@pytest.fixture(scope="module")
def obs(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiledbsoma.DataFrame, pd.DataFrame]:
    uri = str(tmp_path_factory.mktemp("filter") / "obs")
    arrays = [
        pa.array(values, kind.value_type).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(values, kind)
        for values, kind in COLUMNS.values()
    ]
    n_cells = len(arrays[0])
    fields = [pa.field("soma_joinid", pa.int64(), nullable=False)]
    fields += [pa.field(name, kind, name.startswith("some_")) for name, (_, kind) in COLUMNS.items()]
    schema = pa.schema(fields)
    table = pa.Table.from_arrays([pa.array(range(n_cells)), *arrays], names=schema.names).cast(schema)
    tiledbsoma.DataFrame.create(uri, schema=schema, domain=[[0, n_cells - 1]]).close()
    with tiledbsoma.DataFrame.open(uri, "w") as frame:
        frame.write(table)
    frame = pd.DataFrame(
        {name: pd.array(values, dtype=_nullable(kind)) for name, (values, kind) in COLUMNS.items()},
    )
    return tiledbsoma.DataFrame.open(uri), frame


def _nullable(kind: pa.DataType) -> str:
    """The pandas dtype with three-valued logic, as TileDB has it."""
    if pa.types.is_dictionary(kind) or pa.types.is_large_string(kind):
        return "string"
    return {"bool": "boolean", "float": "Float32", "double": "Float64", "uint8": "UInt8"}.get(
        str(kind), str(kind).capitalize()
    )


def found(obs: tiledbsoma.DataFrame, text: str) -> list[int]:
    checked = usable_filter(text, obs.schema, "census.obs_query")
    return sorted(obs.read(value_filter=checked, column_names=["soma_joinid"]).concat()["soma_joinid"].to_pylist())


# --- filters with what they mean


def comparison(name: str, operator: str, value: object, text: str, swapped: bool) -> tuple[str, Mask]:
    mirrored = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}[operator]
    source = f"{text} {mirrored} {name}" if swapped else f"{name} {operator} {text}"
    method = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}[operator]
    return source, lambda frame: getattr(frame[name], method)(value)


def numbers() -> st.SearchStrategy[tuple[str, Mask]]:
    whole = st.integers(0, 120) | st.integers(0, 3)
    fraction = st.sampled_from([0.5, 1.5, 2.5, 100.25])
    order = st.sampled_from(["<", "<=", ">", ">="])
    every = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    swap = st.booleans()
    return st.one_of(
        st.tuples(st.sampled_from(NUMBERS), every, whole, swap).map(
            lambda c: comparison(c[0], c[1], c[2], repr(c[2]), c[3])
        ),
        st.tuples(st.sampled_from(WHOLE), every, whole, swap).map(
            lambda c: comparison(c[0], c[1], c[2], f"{c[2]}.0", c[3])
        ),
        st.tuples(st.sampled_from(NUMBERS), order, fraction, swap).map(
            lambda c: comparison(c[0], c[1], c[2], repr(c[2]), c[3])
        ),
    )


def texts() -> st.SearchStrategy[tuple[str, Mask]]:
    value = st.sampled_from(["a", "b", "", "é", "it's", "a b", "nowhere"])
    return st.tuples(st.sampled_from(LABELS), st.sampled_from(["==", "!="]), value, st.booleans()).map(
        lambda c: comparison(c[0], c[1], c[2], repr(c[2]), c[3])
    )


def member(name: str, values: list, negated: bool) -> tuple[str, Mask]:
    def mask(frame: pd.DataFrame) -> "pd.Series[bool]":
        inside = frame[name].isin(values).astype("boolean").mask(frame[name].isna())
        return ~inside if negated else inside

    return f"{name} {'not in' if negated else 'in'} {values!r}", mask


def members() -> st.SearchStrategy[tuple[str, Mask]]:
    of_text = st.tuples(
        st.sampled_from(LABELS), st.lists(st.sampled_from(["a", "b", "", "é", "nowhere"]), min_size=1), st.booleans()
    )
    of_numbers = st.tuples(st.sampled_from(WHOLE), st.lists(st.integers(0, 5), min_size=1), st.booleans())
    of_flags = st.tuples(st.just("flag"), st.lists(st.booleans(), min_size=1, max_size=3), st.booleans())
    return (of_text | of_numbers | of_flags).map(lambda c: member(*c))


def simple() -> st.SearchStrategy[tuple[str, Mask]]:
    missing = st.tuples(
        st.sampled_from(list(COLUMNS)), st.sampled_from(["== None", "is None", "!= None", "is not None"])
    )
    flags = st.sampled_from(["flag", "flag == True", "flag != False", "flag == 1"])
    return st.one_of(
        numbers(),
        texts(),
        members(),
        flags.map(lambda text: (text, lambda frame: frame["flag"])),
        missing.map(
            lambda c: (
                f"{c[0]} {c[1]}",
                lambda frame: (frame[c[0]].notna() if "!" in c[1] or "not" in c[1] else frame[c[0]].isna()).astype(
                    "boolean"
                ),
            )
        ),
    )


def combined(parts: st.SearchStrategy[tuple[str, Mask]]) -> st.SearchStrategy[tuple[str, Mask]]:
    def joined(c: tuple[tuple[str, Mask], str, tuple[str, Mask]]) -> tuple[str, Mask]:
        (left, one), word, (right, other) = c
        both = word in ("and", "&")
        return (
            f"({left}) {word} ({right})",
            lambda frame: (one(frame) & other(frame)) if both else (one(frame) | other(frame)),
        )

    def negated(c: tuple[str, tuple[str, Mask]]) -> tuple[str, Mask]:
        word, (text, mask) = c
        return f"{word}({text})", lambda frame: ~mask(frame)

    return st.one_of(
        st.tuples(parts, st.sampled_from(["and", "or", "&", "|"]), parts).map(joined),
        st.tuples(st.sampled_from(["not ", "~"]), parts).map(negated),
    )


@settings(max_examples=100, deadline=None)
@given(case=st.recursive(simple(), combined, max_leaves=8))
def test_a_filter_finds_what_pandas_finds(
    case: tuple[str, Mask], obs: tuple[tiledbsoma.DataFrame, pd.DataFrame]
) -> None:
    text, mask = case
    frame, table = obs
    expected = np.flatnonzero(mask(table).fillna(False).to_numpy(dtype=bool))
    assert found(frame, text) == expected.tolist(), text


@pytest.mark.parametrize(
    ("text", "joinids"),
    [
        ("not (label in ['a'])", [1, 2, 3, 4, 5, 6, 7]),
        ("not (label == 'a' and whole > 0)", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("not not not (whole < 2 or flag)", [3, 5, 7]),
        ("1 < whole <= 317", [2, 3, 4, 7]),
        ("not 1 < whole <= 317", [0, 1, 5, 6]),
        ("whole >= 317.5", [5]),
        ("whole > -7.5 and whole < 0.5", [0, 6]),
        ("whole == 317.0", [4]),
        ("label in ('a', 'b')", [0, 1, 7]),
        ("attr('label') == val('b')", [1, 7]),
        ("label == 'b'\n  and whole == 2  # the last\n", [7]),
        ("small == --1", [3]),
    ],
)
def test_forms_of_a_filter(text: str, joinids: list[int], obs: tuple[tiledbsoma.DataFrame, pd.DataFrame]) -> None:
    assert found(obs[0], text) == joinids


def test_nan_matches_unequal_alone(tmp_path: Path) -> None:
    schema = pa.schema([("soma_joinid", pa.int64()), ("score", pa.float64())])
    with tiledbsoma.DataFrame.create(str(tmp_path / "obs"), schema=schema, domain=[[0, 2]]) as frame:
        frame.write(pa.table([[0, 1, 2], [0.5, np.nan, 2.0]], schema=schema))
    with tiledbsoma.DataFrame.open(str(tmp_path / "obs")) as frame:
        expected = {"score >= 1": [2], "not (score < 1)": [2], "score != 2": [0, 1], "not (score == 2)": [0, 1]}
        assert {text: found(frame, text) for text in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty; null takes all cells"),
        ("whole ==", "invalid syntax; example: tissue == 'blood' and nnz >= 300"),
        ("label == 'a", "unterminated string literal"),
        ("(whole == 1", "'(' was never closed"),
        ("whole == 1) or (whole == 2", "unmatched ')'"),
        ("whole == 1] or [whole == 2", "it must be one condition"),
        ("whole == 1, whole == 2", "it must be one condition"),
        ("whole == 1\x00", "null bytes"),
        ("label == '\ud800'", "not valid Unicode"),
        ("not " * 5000 + "flag", "it is nested too deep; list values as in tissue in"),
        ("(" * 500 + "flag" + ")" * 500, "too many nested parentheses"),
        (" or ".join(["whole == 1"] * 2001), "it has 2,001 conditions, at most 2,000 can be read; list values"),
        ("True", "True is not a condition"),
        ("whole == 1 if flag else whole == 2", "is not a condition"),
        ("lambda: 1", "is not a condition"),
        ("whole + 1 == 2", "whole + 1 == 2 has no obs column on one side"),
        ("1 == 1", "has no obs column on one side"),
        ("'a' in label", "has no obs column before in"),
        ("whole == 1 + 1", "1 + 1 is not a value"),
        ("text == b'a'", "b'a' is not a value"),
        ("label == f'a'", "is not a value"),
        ("whole == 1 & flag", "& and | bind closer than ==: put each comparison in parentheses"),
        ("label == blood", "text needs quotes, label == 'blood'"),
        ("colour == 1", "colour is not an obs column of the Census"),
        ("labl == 'a'", "labl is not an obs column of the Census; did you mean label?"),
        ("label in []", "label in needs a list of one value or more"),
        ("label in 'abc'", "label in needs a list"),
        ("some_label in ['a', None]", "for missing values write some_label == None"),
        ("some_whole > None", "for missing values write == None"),
        ("label > 'a'", "the values of label have no order, so > is not possible; use ==, != or label in ['a', 'b']"),
        ("flag < True", "the values of flag have no order, so < is not possible"),
        ("flag == 2", "flag holds true or false and is compared with 2; compare with True or False"),
        ("flag == 'True'", "compare with True or False"),
        ("label == 1", "label holds text and is compared with 1; put it in quotes, '1'"),
        ("whole == '1'", "whole holds whole numbers and is compared with '1'; compare with a number, without quotes"),
        ("whole == True", "compare with a number, without quotes"),
        ("whole", "whole holds whole numbers and is compared with True"),
        ("whole == 1.5", "whole holds whole numbers and is compared with 1.5; compare with a whole number"),
        ("whole in [1, 2.5]", "compared with 2.5; compare with a whole number"),
        ("small > 200", "small holds whole numbers and is compared with 200; they lie between -128 and 127"),
        ("count >= -1", "they lie between 0 and 255"),
        ("whole < 99999999999999999999", "they lie between -9.22337e+18 and 9.22337e+18"),
        ("share < 1e39", "they lie between -3.40282e+38 and 3.40282e+38"),
        ("whole < 1e999", "whole holds whole numbers and is compared with inf"),
    ],
)  # fmt: skip
def test_a_filter_that_cannot_be_used_is_one_line(
    text: str, message: str, obs: tuple[tiledbsoma.DataFrame, pd.DataFrame]
) -> None:
    with pytest.raises(FilterError) as caught:
        found(obs[0], text)
    assert str(caught.value).startswith("census.obs_query ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text() | st.text("not()[]&|<>=!'\"aflg ,.~-1", max_size=60))
def test_any_text_is_a_filter_or_a_value_error(text: str) -> None:
    try:
        parse_filter(text)
    except ValueError as error:
        assert str(error)


SETTINGS = {
    "prepare": ["census.obs_query", "census.obs_query_model"],
    "create-latent-update": ["census.obs_query"],
    "evaluate": ["evaluate.obs_filter"],
}


@pytest.mark.parametrize(
    ("stage", "setting"), [(stage, setting) for stage, names in SETTINGS.items() for setting in names]
)
def test_the_message_names_the_setting(
    stage: str, setting: str, finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished_run.manifest()
    force = ["--force"] if stage != "evaluate" else []
    for text, message in (
        ("nnz == 1.5", "nnz holds whole numbers and is compared with 1.5"),
        ("(nnz == 1", "'(' was never closed"),
    ):
        assert finished_run(stage, *force, f"{setting}={text}") == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        assert f"{setting} " in errors[0]
        assert message in errors[0]
    assert finished_run.manifest() == before  # what was finished stays so


@pytest.mark.parametrize("engine", ["one-pass", "census"])
def test_prepare_takes_a_negated_group(engine: str, demo_census: str, tmp_path: Path) -> None:
    query = "not (tissue in ['blood'] or nnz < 99.5)"
    run = Run(tmp_path, demo_census, census={"obs_query": query}, hvg={"engine": engine, "hvg_batch": []})
    assert run("prepare") == 0
    with open_census(CensusSection(uri=demo_census)) as census:
        frame = census.experiment.obs.read().concat().to_pandas()
        kept = frame[~((frame["tissue"] == "blood") | (frame["nnz"] < 99.5))]
        assert len(kept) not in (0, len(frame))
        assert matching_joinids(census, query).tolist() == kept["soma_joinid"].tolist()
        select = partial(select_cells, census, batch_key=["assay"])
        assert select(query).joinids.tolist() == kept["soma_joinid"].tolist()
    primary = kept["is_primary_data"]
    assert run.record("prepare")["counts"]["cells"] == int((primary & (kept["nnz"] >= 50)).sum())
