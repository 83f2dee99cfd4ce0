"""The stamps of Tux Paint as Debian installs them: a picture, its name in many languages, recordings of it.

    animals/birds/crow.png           or crow.svg
    animals/birds/crow.txt           "A crow.", then a line a language: "fr.utf8=Un corbeau."
    animals/birds/crow.dat           options; "nomirror": its mirror image would be wrong
    animals/birds/crow_desc_fr.ogg   its name, spoken; crow_desc.ogg is in English

The package is tuxpaint-stamps-default, version 2022.06.04-1 when this was written.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from mm.errors import DataError

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = Path("/usr/share/tuxpaint/stamps")
ENGLISH = "en"
RECORDING = re.compile(r"(?P<stamp>.+)_desc(_(?P<language>[a-z]{2,3}(_[A-Z]{2})?))?\.(ogg|wav)")
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60  # bytes of a member's header in a .deb, which is an ar archive


@dataclass(frozen=True)
class Stamp:
    """A picture, what it is called and how that is said."""

    name: str  # path from the folder of stamps, without ending: "animals/birds/crow"
    picture: Path
    mirror: bool  # whether it may be mirrored
    names: Mapping[str, str]  # by language, such as "fr" or "pt_BR"
    recordings: Mapping[str, Path]  # by language

    @property
    def category(self) -> str:
        """The first of the folders that it is in: "animals"."""
        return self.name.partition("/")[0]


def read_stamps(folder: Path) -> list[Stamp]:
    """The stamps of a folder in alphabetical order; raises DataError where there is none."""
    recordings: dict[str, dict[str, Path]] = {}
    for path in sorted(p for p in folder.rglob("*_desc*") if p.is_file()):
        found = RECORDING.fullmatch(path.relative_to(folder).as_posix())
        if found is not None:
            recordings.setdefault(found["stamp"], {})[found["language"] or ENGLISH] = path
    stamps = []
    for path in sorted(folder.rglob("*.txt")):
        picture = next((p for p in (path.with_suffix(".png"), path.with_suffix(".svg")) if p.is_file()), None)
        if picture is None:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        options = path.with_suffix(".dat")
        mirror = not options.is_file() or "nomirror" not in options.read_text("utf-8", "replace").split()
        stamps.append(Stamp(name, picture, mirror, _names(path), recordings.get(name, {})))
    if not stamps:
        raise DataError(
            f"{folder} has no stamps of Tux Paint; needed: the folder of the Debian package {PACKAGE} "
            f"(apt-get install {PACKAGE} makes {INSTALLED}), or its .deb (apt-get download {PACKAGE}), "
            "by --from"
        )
    return stamps


def _names(path: Path) -> dict[str, str]:
    """By language, a stamp's name; languages without one are left out."""
    first, *rest = path.read_text("utf-8", "replace").splitlines() or [""]
    found = {ENGLISH: first.strip()}
    for line in rest:
        language, sign, name = line.partition(".utf8=")
        if sign:
            found[language.strip()] = name.strip()
    return {language: name for language, name in found.items() if name}


@contextmanager
def opened_stamps(source: Path | None) -> Iterator[list[Stamp]]:
    """The stamps of a folder, or of a .deb, which is unpacked while the context lasts; by default those that
    Debian has installed. Raises DataError where there are none.
    """
    if source is None or not source.is_file():
        yield read_stamps(source or INSTALLED)
        return
    with TemporaryDirectory() as folder:
        with source.open("rb") as package:
            _unpack(package, Path(folder))
        yield read_stamps(Path(folder).joinpath(*INSTALLED.parts[1:]))


def _unpack(package: BinaryIO, folder: Path) -> None:
    """The stamps of a .deb to a folder; raises DataError for a file that is none. Format: deb(5), ar(5)."""
    if package.read(len(AR_MAGIC)) != AR_MAGIC:
        raise DataError(f"{package.name} is neither a folder nor a Debian package")
    while header := package.read(AR_HEADER):
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58]
        if name.startswith("data.tar"):
            inside = str(INSTALLED.relative_to("/"))
            try:
                with tarfile.open(fileobj=package, mode="r|*") as tar:
                    tar.extractall(folder, (m for m in tar if inside in m.name), filter="data")
            except tarfile.TarError as error:
                raise DataError(
                    f"{package.name}: {name} cannot be read ({error}); needed: its folder, which "
                    f"dpkg-deb -x {package.name} FOLDER unpacks, by --from FOLDER{INSTALLED}"
                ) from error
            return
        skipped = int(size)
        package.seek(skipped + skipped % 2, 1)
    raise DataError(f"{package.name} is a Debian package without data")
