"""What there is to convert: the files with records, in order, of files, patterns and folders."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from mm.data.convert.records import KINDS, kind_name
from mm.data.layouts.energon import META, split_parts
from mm.data.layouts.find import NAMES
from mm.errors import DataError

MANY = (".parquet", ".tar", ".trans.txt", ".jsonl")  # kinds of which a folder's files are one data set
TABLES = (".json", ".tsv", ".csv")  # a folder's are often several data sets, or about others
SHOWN = 5


def input_files(given: Sequence[str], split: str | None) -> list[Path]:
    """The files with records, in order of their names in what is given. Raises DataError in words."""
    out: list[Path] = []
    for one in given:
        path = Path(one)
        if path.is_dir():
            out += _of_folder(path, split)
            continue
        found = [Path(p) for p in sorted(glob.glob(one))] if not path.is_file() else [path]
        if not found:
            raise DataError(f"{one} does not exist; needed: files, patterns or folders of samples")
        for file in found:
            if kind_name(file) is None:
                raise DataError(
                    f"{file} is of no kind that has samples; known: {', '.join(KINDS)}, or a folder of them"
                )
        out += found
    if split is not None and not any((Path(one) / META).is_dir() for one in given):
        raise DataError(f"--split {split}: only a folder with {META} (Energon) says what its splits are")
    return list(dict.fromkeys(out))


def _of_folder(folder: Path, split: str | None) -> list[Path]:
    if (folder / META).is_dir():
        return split_parts(folder, split)
    by_kind: dict[str, list[Path]] = {}
    others: dict[str, int] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        name = kind_name(file)
        if name is None:
            others[file.suffix or file.name] = others.get(file.suffix or file.name, 0) + 1
        else:
            by_kind.setdefault(name, []).append(file)
    many = [k for k in MANY if k in by_kind]
    tables = [f for k in TABLES for f in by_kind.get(k, ())]
    if len(many) == 1:
        return by_kind[many[0]]
    if not many and len(tables) == 1:
        return tables
    if not many and not tables and by_kind:
        return by_kind[".txt"]
    have = [f"{len(files)} {k}" for k, files in by_kind.items()]
    have += [f"{n} {suffix}" for suffix, n in sorted(others.items(), key=lambda x: -x[1])[:SHOWN]]
    if many or tables:
        examples = ", ".join(str(f) for k in [*many, *TABLES] for f in by_kind.get(k, ())[:2])
        raise DataError(
            f"{folder} has {', '.join(have)}; needed: the files that are meant, such as {examples}"
        )
    raise DataError(
        f"{folder} has no samples in a layout that is known: it has {', '.join(have) or 'nothing'}. Files "
        f"that have samples: {', '.join(KINDS)}; layouts: {', '.join(NAMES)}, a mapping of fields, "
        "module:function (docs/data.md)"
    )
