"""The assistant of all families, and the table of what they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedModel, logging

from conformance.families import TYPES
from conformance.holding import make_assistant
from conformance.table import Row, write


@pytest.fixture(scope="session")
def conformance_assistant() -> PreTrainedModel:
    logging.set_verbosity_error()  # of tiny configs, there is much to say
    return make_assistant()


@pytest.fixture(scope="session")
def report() -> Iterator[Callable[[Row], None]]:
    """Takes a row; when there is one for every type, the table is written."""
    rows: dict[str, Row] = {}
    begin = time.perf_counter()

    def take(row: Row) -> None:
        rows[row.model_type] = row

    yield take
    if set(rows) == set(TYPES):
        write(rows.values(), time.perf_counter() - begin)
