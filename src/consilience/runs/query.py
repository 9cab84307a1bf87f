"""Questions to a run's tables, in SQL, through DuckDB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from consilience.files import place, read_table
from consilience.types import ConsilienceError

TABLES = {
    "explanations": "explanations.parquet",
    "agreement": "agreement.parquet",
    "timings": "timings.parquet",
    "scores": "metrics.parquet",
    "units": "units.parquet",
    "words": "words.parquet",
    "knockout": "knockout.parquet",
    "hurt": "hurt.parquet",
}
"""Names of tables in a query, and the files that they stand for where a run has them."""


def query(run: str | Path, sql: str) -> Any:
    """The answer of a query, as DuckDB's relation: ``.df()`` for pandas, ``.pl()`` for
    polars, ``.arrow()``.

    Tables are those of `TABLES` that the run has, and ``findings`` of its audit. A query
    reads them and nothing else: no other file, no network, nothing is written.

    Raises `ConsilienceError` in one line for what is wrong with it.
    """
    try:
        import duckdb
    except ImportError:
        raise ConsilienceError(
            "query needs duckdb: pip install 'consilience[query]'"
        ) from None
    folder = place(run)
    tables = tables_of(folder)
    if not tables:
        raise ConsilienceError(f"{folder} holds no finished run")
    connection = duckdb.connect(":memory:", config={"threads": 2})
    try:
        for name, table in tables.items():
            connection.register(name, table)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        answer = connection.sql(sql)
    except duckdb.Error as error:
        said = " ".join(str(error).split())
        raise ConsilienceError(f"{said}; tables: {', '.join(tables)}") from None
    if answer is None:
        raise ConsilienceError("a query begins with SELECT")
    return answer


def tables_of(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables that a run has, by name."""
    found = {
        name: read_table(folder / file)
        for name, file in TABLES.items()
        if (folder / file).is_file()
    }
    if "explanations" in found:
        from consilience.runs.folder import Run

        run = Run(folder)
        found["explanations"] = run.explanations
        found["findings"] = pd.DataFrame(
            [
                {
                    "code": one.code,
                    "severity": one.severity,
                    "where": one.where,
                    "message": one.message,
                    "advice": one.advice,
                }
                for one in run.audit
            ],
            columns=["code", "severity", "where", "message", "advice"],
        )
    return found
