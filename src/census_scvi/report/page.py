"""Fills the templates of the reports."""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """The page of a template of this folder; a name that the template needs and that has no value is an error."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    """Compiles each template once per process."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True
    )
    environment.filters |= {"shown": _shown, "place": _place}
    return environment


def _read(name: str) -> str:
    return files("census_scvi.report").joinpath(name).read_text(encoding="utf-8")


def _shown(value: Any) -> str:
    """Number with three digits, or a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}"


def _place(value: Any, width: float) -> float:
    """Position of a value on a bar from 0 to `width`."""
    return round(min(max(float(value), 0.0), 1.0) * width, 1)
