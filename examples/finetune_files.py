# Copyright 2026 The ChatGLM Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which rows does a file, a folder of files or a saved data set hold, and where does each stand?

JSON (one array, or one object in a line), CSV, Parquet, and what `save_to_disk` of `datasets` writes. Text is UTF-8, with
or without a byte-order mark.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet


SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
# What files of one data set are called that are not to be trained on together.
SPLITS = {"train", "dev", "val", "valid", "validation", "eval", "test"}
PlacedRecord = tuple[str, dict[str, Any]]


def find_files(path: Path) -> list[Path]:
    """The files to read, in order; a data set of `save_to_disk` counts as one.

    Raises:
        OSError: if there is nothing at the path.
        ValueError: if a folder holds nothing that can be read, or several splits.
    """
    if not path.is_dir():
        return [path]
    if (path / "state.json").is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder for folder in path.iterdir() if (folder / "state.json").is_file())
        if len(splits) != 1:
            raise ValueError(f"{path} holds several splits; name one of {', '.join(map(str, splits))}")
        return splits
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"the folder {path} holds neither a saved data set nor files of {', '.join(SUFFIXES)}")
    splits = [file for file in files if file.stem.lower() in SPLITS]
    if len({file.stem.lower() for file in splits}) > 1:
        raise ValueError(f"{path} holds several splits; name one of {', '.join(map(str, splits))}")
    return files


def read_records(path: Path) -> Iterator[PlacedRecord]:
    """The rows of a file that `find_files` found, each with its place.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged, or not what its name says; with the place.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    reader = _read_saved if path.is_dir() else readers.get(path.suffix.lower(), _read_json)
    try:
        for place, record in reader(path):
            if not isinstance(record, dict):
                raise ValueError(f"{place}: a row must be a JSON object, got {type(record).__name__}")
            yield place, record
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it, for example with "
            f"`iconv -f gb18030 -t utf-8`"
        ) from error


def _read_json(path: Path) -> Iterator[PlacedRecord]:
    """An array, or an object in a line, whatever the name of the file says."""
    with path.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if first.lstrip().startswith("["):
            try:
                records = json.load(lines)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{error.lineno}: the array is not JSON: {error}") from error
            yield from ((f"{path}: element {number}", record) for number, record in enumerate(records, start=1))
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place}: this line is not JSON: {error}; a file holds one object in a line, or one array"
                ) from error


def _read_csv(path: Path) -> Iterator[PlacedRecord]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            for row in rows:
                place = f"{path}:{rows.line_num}"
                # `None` stands for what has no column, or for what a row lacks.
                if None in row or None in row.values():
                    raise ValueError(
                        f"{place}: the row has not as many fields as the header ({len(rows.fieldnames or ())}); texts "
                        "with commas, quotes or line breaks need quotes around them"
                    )
                yield place, row
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: this is not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[PlacedRecord]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _without_nulls(row)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged, or no Parquet file ({error})") from error


def _read_saved(path: Path) -> Iterator[PlacedRecord]:
    try:
        rows = datasets.load_from_disk(str(path)).with_format(None)
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no data set of `save_to_disk` ({error})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """A row of an Arrow table as it was before: the table gives every object the keys of all others, with nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


__all__ = ["find_files", "read_records"]
