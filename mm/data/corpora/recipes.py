"""The recipes by name, and what each needs to be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mm.data.corpora.digits import prepare_digits
from mm.data.corpora.shards import Made
from mm.data.corpora.skimage import prepare_skimage
from mm.data.corpora.tuxpaint import prepare_tuxpaint
from mm.data.corpora.twemoji import prepare_twemoji
from mm.errors import Refused

Prepare = Callable[[Path, Path | None, int], Made]


@dataclass(frozen=True)
class Recipe:
    """prepare(out, source, seed) writes the shards. source: what --from names, or None.

    takes: what --from may name; "" where nothing.
    """

    prepare: Prepare
    takes: str


def _digits(out: Path, source: Path | None, seed: int) -> Made:
    shards = prepare_digits(out, seed)
    return Made(shards, "860 samples to train on, 144 held out.")


RECIPES: Mapping[str, Recipe] = {
    "digits": Recipe(_digits, ""),
    "skimage": Recipe(prepare_skimage, "a folder with scikit-image's pictures"),
    "tuxpaint": Recipe(prepare_tuxpaint, "the folder of the stamps, or the .deb"),
    "twemoji": Recipe(prepare_twemoji, "a folder with Twemoji's PNGs"),
}


def prepare(name: str, out: Path, source: Path | None, seed: int) -> Made:
    """Write a corpus to the folder `out`; raises Refused and DataError in words."""
    recipe = RECIPES[name]
    if source is not None and not recipe.takes:
        raise Refused(f"data prepare {name} takes no --from: all of it is in the packages of the extra data")
    if source is not None and not source.exists():
        raise Refused(f"--from {source}: there is none; needed: {recipe.takes}")
    try:
        return recipe.prepare(out, source, seed)
    except ModuleNotFoundError as error:
        raise Refused(f"data prepare {name} needs {error.name}: pip install -e '.[data]'") from error
