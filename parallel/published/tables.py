"""Tensors of published files and parameters: a table of rows, read in both directions.

A tensor of a file may hold several parameters, one after another: published files fuse what tp shards evenly
only when it is apart. A parameter may be many tensors: files list experts that are stacked here for grouped
products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of a file and its parameters here. Rows whose parameters a model lacks do not count."""

    theirs: str
    """The tensor's key; {e} in it: one tensor an expert, which ours stacks along dim 0."""
    ours: tuple[str, ...]
    """The parameters that the tensor holds one after another along `dim`."""
    tail: Shape = ()
    """Dims of the file's tensor after the first where ours has others of as many elements, such as (3, p, p)
    of a convolution that is a linear map here; -1 is what remains."""
    lead: int = 0
    """Dims of 1 that the file's tensor has before those of ours, such as the batch of a class token; -1 where
    it lacks our first dim, of 1."""
    dim: int = 0
    """The dim along which parameters follow each other, such as 1 for gate and up of stacked experts."""
    mixed: bool = False
    """Whether parameters of one size take turns along `dim`, an index each, and do not follow each other."""
    flipped: bool = False
    """Whether the last two dims of the file's tensor are those of ours the other way round."""


@dataclass(frozen=True)
class Part:
    """Where parameter `name` lies in a tensor of a file: from index `first` on, at every `step`-th, or as its
    expert `expert`."""

    name: str
    first: int = 0
    expert: int | None = None
    step: int = 1


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a published checkpoint: its key, its shape, and the parameters in it, along `dim`.

    lead: how many dims of 1 come before those of the parameters; -1 where their first, of 1, is absent.
    flipped: whether its last two dims are those of the parameters the other way round; `dim` is of these.
    """

    key: str
    shape: Shape
    parts: tuple[Part, ...]
    lead: int = 0
    dim: int = 0
    flipped: bool = False


def file_tensors(
    rows: Iterable[tuple[Row, str, str]], shapes: Mapping[str, Shape], zero: Collection[str] = ()
) -> list[FileTensor]:
    """The tensors of a model's files, in the order of `rows`.

    rows: each with the prefix of its key there and of its parameters here.
    shapes: global shape of each parameter and persistent buffer of the model, by name.
    zero: names that the files lack, which are zero.
    """
    out: list[FileTensor] = []
    for row, there, here in rows:
        names = [here + name for name in row.ours]
        if names[0] in shapes and names[0] not in zero:
            out += _tensors(row, there + row.theirs, names, [shapes[n] for n in names])
    covered = {part.name for tensor in out for part in tensor.parts} | set(zero)
    assert covered == set(shapes), f"the table does not know {sorted(set(shapes) - covered)}"
    return out


def _tensors(row: Row, key: str, names: list[str], shapes: list[Shape]) -> list[FileTensor]:
    rest = shapes[0][1:]
    if "{e}" in key:
        return [FileTensor(key.format(e=e), rest, (Part(names[0], expert=e),)) for e in range(shapes[0][0])]
    parts, rows = [], 0
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        parts.append(Part(name, i, step=len(names)) if row.mixed else Part(name, rows))
        rows += shape[row.dim]
    if row.dim:
        whole = (*shapes[0][: row.dim], rows, *shapes[0][row.dim + 1 :])
        whole = (*whole[:-2], whole[-1], whole[-2]) if row.flipped else whole
        return [FileTensor(key, whole, tuple(parts), dim=row.dim, flipped=row.flipped)]
    assert not (row.mixed or row.flipped), row
    return [FileTensor(key, _led(row.lead, (rows, *_dims(row.tail, rest))), tuple(parts), row.lead)]


def _led(lead: int, shape: Shape) -> Shape:
    assert lead >= 0 or shape[0] == 1, shape
    return (1,) * lead + shape if lead >= 0 else shape[1:]


def _dims(tail: Shape, rest: Shape) -> Shape:
    """The dims of a file's tensor after the first; rest: those of ours."""
    if not tail:
        return rest
    known = abs(_product(tail))
    assert _product(rest) % known == 0, (tail, rest)
    return tuple(_product(rest) // known if n == -1 else n for n in tail)


def _product(dims: Shape) -> int:
    out = 1
    for n in dims:
        out *= n
    return out


def parts_by_name(tensors: Sequence[FileTensor]) -> dict[str, list[tuple[FileTensor, Part]]]:
    """By parameter: the tensors that hold it, each with its part of that tensor."""
    out: dict[str, list[tuple[FileTensor, Part]]] = defaultdict(list)
    for tensor in tensors:
        for part in tensor.parts:
            out[part.name].append((tensor, part))
    return out


def check_tensors(needed: Sequence[FileTensor], given: Mapping[str, Shape], where: str) -> None:
    """Raise ValueError unless `given`, by key, are exactly the tensors needed, with their shapes."""
    shapes = {t.key: t.shape for t in needed}
    wrong = [f"missing: {_some(shapes.keys() - given.keys())}"] if shapes.keys() - given.keys() else []
    if given.keys() - shapes.keys():
        wrong.append(f"unknown: {_some(given.keys() - shapes.keys())}")
    wrong += [
        f"{key} has shape {list(given[key])}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in given and given[key] != shape
    ][:LISTED]
    if wrong:
        raise ValueError(
            f"{where} is not a checkpoint of the model that its config describes. " + "; ".join(wrong)
        )


LISTED = 20


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
