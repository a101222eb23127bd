"""Foreign text files: track tables (CSV, TSV, Baskerville's ``targets.txt``) and FASTA records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from seqgraft.errors import DataError, Problems
from seqgraft.tracks import TrackTable

__all__ = ["fasta_records", "read_track_table"]


def read_track_table(tracks: Path | str | Sequence[Mapping[str, Any]], *, transform_old: bool = False) -> TrackTable:
    """A track table from a CSV, TSV or Baskerville ``targets.txt`` file, or from its rows.

    Of ``targets.txt``, ``identifier`` becomes the name, ``sum_stat`` statistic and squash, ``strand_pair`` (a row
    index) the partner's name, and the assay before the colon of ``description`` the group.

    Raises:
        DataError: no such file, unknown columns or values, duplicated names, unpaired strands; all of them at once.
    """
    if not isinstance(tracks, (str, Path)):
        return TrackTable.build(tracks)
    path = Path(tracks)
    if not path.is_file():
        raise DataError("the track table does not exist", where=path, remedy="Check the path")
    try:
        table = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        remedy = "Give a .csv file with commas, or .tsv or .txt with tabs"
        raise DataError(f"the track table cannot be read ({error})", where=path, remedy=remedy) from error
    rows: list[dict[str, Any]] = [{str(c): v for c, v in row.items()} for row in table.to_dict("records")]
    if "sum_stat" in table.columns:
        rows = _from_targets(rows, str(table.columns[0]), path, transform_old)
    for row in rows:
        if row.get("file"):
            row["file"] = str(path.parent / row["file"])
    return TrackTable.build(rows)


_SUM_STAT = re.compile(r"(sum|mean)(_sqrt|_exp75)?")


def _from_targets(rows: list[dict[str, Any]], index: str, path: Path, old: bool) -> list[dict[str, Any]]:
    problems = Problems(DataError)
    names = {row[index]: row.get("identifier", "") for row in rows}
    kinds = (
        {"_sqrt": "power75_legacy", None: "none_legacy"} if old else {"_sqrt": "sqrt", "_exp75": "exp75", None: "none"}
    )
    converted = []
    for number, row in enumerate(rows):
        where = f"{path} row {number}"
        found = _SUM_STAT.fullmatch(row["sum_stat"])
        if not found or found[2] not in kinds:
            allowed = ", ".join(f"{s}{kind or ''}" for s in ("sum", "mean") for kind in kinds)
            problems.add("sum_stat is unknown", row["sum_stat"], where=where, remedy=f"Choose from {allowed}")
            continue
        pair = row.get("strand_pair", "")
        if pair and pair not in names:
            problems.add("strand_pair is not a row", pair, where=where, remedy="Give the index of the partner's row")
        assay, colon, _ = row.get("description", "").partition(":")
        converted.append(
            {
                "name": names[row[index]],
                "group": assay if colon else "",
                "strand_pair": names.get(pair, ""),
                "statistic": found[1],
                "squash": kinds[found[2]],
                "scale": row.get("scale", ""),
                "soft_clip": row.get("clip_soft", ""),
                "clip": row.get("clip", ""),
                "file": row.get("file", ""),
            }
        )
    problems.raise_if_any()
    return converted


def fasta_records(lines: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
    """Header (without ">") and letters of each record; blank lines do not count.

    Raises:
        DataError: letters before the first header.
    """
    header: str | None = None
    parts: list[str] = []
    for line in lines:
        text = line.strip()
        if text.startswith(">"):
            if header is not None:
                yield header, "".join(parts)
            header, parts = text[1:].strip(), []
        elif text and header is None:
            raise DataError("the file does not start with '>'", text[:20], where=path, remedy="Give a FASTA file")
        else:
            parts.append(text)
    if header is not None:
        yield header, "".join(parts)
