"""The files of a tar and their offsets, also of a damaged tar.

Every header has a checksum. A header that fails it is noted, and the scan goes on at the next valid header: a
damaged header costs one file, and not those after it. The content of extended headers (PAX, GNU) has no
checksum: it is compared with the header that it extends, where that header has a field for the same fact.

Formats: POSIX.1-2017, pax, "pax Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass

from mm.data.storage import LOCAL, Location, OpenFile
from mm.errors import DataError

BLOCK = 512  # bytes: a tar consists of blocks of this size; a header is one, a payload is padded with zeros
CHUNK = 2**20  # bytes that are searched at once
LONGEST = 2**20  # bytes: an extended header holds names and times, so a longer one is damaged
USTAR_SIZES = 8 * 2**30  # bytes: a header has room for smaller sizes, so PAX need not repeat them
RECORDS = {"atime", "charset", "comment", "ctime", "gid", "gname", "hdrcharset", "linkpath"} | {
    *("mtime", "path", "size", "uid", "uname")
}  # keywords of PAX headers; vendors' own keywords have a dot
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


@dataclass(frozen=True)
class File:
    """A whole regular file: its payload is bytes [offset, offset + size) of the tar."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Loss:
    """A file, or a stretch of the tar, that cannot be read."""

    name: str  # "" where none is known
    why: str
    sure: bool = True  # the name itself is not damaged


@dataclass(frozen=True)
class Contents:
    """What a scan has found."""

    files: tuple[File, ...]  # in order
    lost: tuple[Loss, ...]
    torn: bool  # the tar ends before its end mark: how much is missing is unknown


def split_name(name: str) -> tuple[str, str] | None:
    """(key, part) of a file's name by WebDataset's rule: the key ends at the first dot after the last slash.

    The folder belongs to the key. Returns None for names that WebDataset ignores: hidden files (`._k.json`),
    files without an extension, and metadata (`__name__`).
    """
    folder, slash, base = name.rpartition("/")
    stem, _, part = base.partition(".")
    if not stem or not part or re.match(r"__[^/]*__($|/)", name):
        return None
    return folder + slash + stem, part


def read_contents(path: Location) -> Contents:
    """contents_of() a file of this machine."""
    with LOCAL.reading(path) as file:
        return contents_of(file, path)


def contents_of(file: OpenFile, path: Location) -> Contents:
    """Scan the headers of a tar; payloads are not read. Raises DataError for a compressed file."""
    first = file.read_at(0, BLOCK)
    kind = next((kind for magic, kind in COMPRESSED.items() if first.startswith(magic)), None)
    if kind is not None and _header(first) is None:
        raise DataError(
            f"{path} is compressed with {kind[0]}; samples are read by their place in the file, which "
            f"compression hides; needed: a plain tar, such as {kind[1]} {path} makes"
        )
    return _Scan(file, file.version.size).run()


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header in a block; None where it is no header or fails its checksum."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return header if header.size >= 0 else None


def _records(body: bytes) -> dict[str, str]:
    """The records of a PAX header, each "LENGTH KEYWORD=VALUE\\n"; raises ValueError where it is damaged."""
    out, at = {}, 0
    while at < len(body):
        match = re.compile(rb"([1-9]\d*) ([!-<>-~]+)=").match(body, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(body) or body[end - 1 : end] != b"\n":
            raise ValueError(f"no record at byte {at} of it")
        keyword = match[2].decode()
        if keyword not in RECORDS and "." not in keyword:
            raise ValueError(f"unknown record {keyword!r}")
        out[keyword] = body[match.end() : end - 1].decode("utf-8", "backslashreplace")
        at = end
    return out


class _Scan:
    """One scan over the headers of a tar of `size` bytes."""

    def __init__(self, file: OpenFile, size: int) -> None:
        self.file, self.size = file, size
        self.files: list[File] = []
        self.lost: list[Loss] = []
        self.torn = False
        self.headers = 0
        self.extended: dict[str, str] = {}  # records of extended headers, about the next file
        self.doubt = ""  # why the next file cannot be trusted
        self.after_damage = False  # a damaged header came before: the next file's long name may be lost

    def run(self) -> Contents:
        at: int | None = 0
        while at is not None:
            at = self._step(at)
        return Contents(tuple(self.files), tuple(self.lost), self.torn)

    def _read(self, at: int, n: int) -> bytes:
        return self.file.read_at(at, n)

    def _step(self, at: int) -> int | None:
        """Read the header at byte `at`; returns where the next one should be, None at the end."""
        block = self._read(at, BLOCK)
        if len(block) < BLOCK:
            begun = "it ends without an end mark" if at else "it is no tar archive"
            self._tear("", begun if self.size else "it is an empty file")
            return None
        if not any(block):
            return self._zeros(at)
        header = _header(block)
        if header is None:
            return self._damaged(at, block)
        self.headers += 1
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"x", b"X", b"g"):
            return self._extension(at, header, block)
        return self._member(at, header, block)

    def _tear(self, name: str, why: str) -> None:
        self.torn = True
        self.lost.append(Loss(name, why))

    def _zeros(self, at: int) -> int | None:
        """The end mark, unless something follows: a tar appended to another, or a hole in this one."""
        begin = self._past_zeros(at)
        if begin is None:
            return None
        found = self._next_header(begin)
        if found is None:
            self.lost.append(Loss("", f"bytes {begin}-{self.size} after its end mark have no header"))
        else:
            self.lost.append(Loss("", f"bytes {at}-{found} are no file, though more files follow"))
        return found

    def _damaged(self, at: int, block: bytes) -> int | None:
        """Note an invalid header; returns where the next valid one is, None at the end."""
        found = self._next_header(at + BLOCK)
        if found is None and not self.headers:
            self._tear("", "it is no tar archive")
            return None
        short = block[:100].partition(b"\0")[0].decode("ascii", "backslashreplace")
        name = self.extended.get("path", short)
        if found is None:
            self.torn = any(self._read(max(0, self.size - BLOCK), BLOCK)) or self.size % BLOCK != 0
        to = self.size if found is None else found
        why = f"the header at byte {at} is damaged; bytes {at}-{to} are not read"
        self.lost.append(Loss(name, why, "path" in self.extended))
        self.extended, self.doubt, self.after_damage = {}, "", True
        return found

    def _extension(self, at: int, header: tarfile.TarInfo, block: bytes) -> int | None:
        """Keep the records of an extended header for the next file."""
        if header.size > LONGEST:
            return self._damaged(at, block)
        body = self._read(at + BLOCK, header.size)
        if len(body) < header.size:
            self._tear("", "it ends in an extended header")
            return None
        try:
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = body.rstrip(b"\0")
                if not name or b"\0" in name:
                    raise ValueError("it has no name")
                self.extended["path"] = name.decode("utf-8", "backslashreplace")
            elif header.type != tarfile.GNUTYPE_LONGLINK:
                records = _records(body)
                self.extended |= records if header.type != b"g" else {}
        except ValueError as error:
            if header.type == b"g":
                self.lost.append(Loss("", f"the global header at byte {at} is damaged: {error}"))
            else:
                self.doubt = f"the extended header at byte {at} is damaged: {error}"
        return _after(at, header.size)

    def _member(self, at: int, header: tarfile.TarInfo, block: bytes) -> int | None:
        extended, doubt, after_damage = self.extended, self.doubt, self.after_damage
        name, size = extended.get("path", header.name), header.size
        if "size" in extended:
            given = int(extended["size"]) if extended["size"].isdecimal() else -1
            # A size that the header has no room for is 0 there, or the largest that it can say.
            small = given < USTAR_SIZES or size < USTAR_SIZES - 1
            if given < 0 or (size and given != size and small):
                return self._damaged(at, block)
            size = given
        self.extended, self.doubt, self.after_damage = {}, "", False
        if not (header.isreg() or header.type not in tarfile.SUPPORTED_TYPES):
            size = 0  # links, folders and devices have no payload
        if at + BLOCK + size > self.size:
            self._tear(name, f"its payload ends after {self.size - at - BLOCK} of {size} bytes")
            return None
        doubt = doubt or _name_doubt(block, extended.get("path"), after_damage)
        if doubt:
            self.lost.append(Loss(name, doubt, sure=False))
        elif header.type == tarfile.GNUTYPE_SPARSE or any(k.startswith("GNU.sparse") for k in extended):
            name = extended.get("GNU.sparse.name", name)
            self.lost.append(Loss(name, "it is stored with holes; needed: tar without --sparse"))
        elif header.isreg():
            self.files.append(File(name, at + BLOCK, size))
        elif split_name(name) is not None and not header.isdir():
            link = header.islnk() or header.issym()
            what = f"a link to {header.linkname}" if link else f"no file (type {header.type!r})"
            hint = "; needed: tar -h --hard-dereference" if link else ""
            self.lost.append(Loss(name, f"it is {what}{hint}"))
        return _after(at, size)

    def _past_zeros(self, at: int) -> int | None:
        """Offset of the first block from `at` on that is not all zeros; None where there is none."""
        for begin in range(at, self.size, CHUNK):
            chunk = self._read(begin, CHUNK)
            rest = len(chunk.lstrip(b"\0"))
            if rest:
                return begin + (len(chunk) - rest) // BLOCK * BLOCK
        return None

    def _next_header(self, at: int) -> int | None:
        """Offset of the first valid header from `at` on; only blocks with the magic of one are parsed."""
        for begin in range(at, self.size, CHUNK):
            chunk = self._read(begin, CHUNK)
            for match in re.finditer(rb"ustar", chunk):
                place = match.start() - 257
                if place >= 0 and place % BLOCK == 0 and _header(chunk[place : place + BLOCK]) is not None:
                    return begin + place
        return None


def _after(at: int, size: int) -> int:
    """Offset of the header that follows the header at `at` and its payload of `size` bytes."""
    return at + BLOCK + -(-size // BLOCK) * BLOCK


def _name_doubt(block: bytes, path: str | None, after_damage: bool) -> str:
    """Why a file's name cannot be trusted, "" where it can.

    An extended header holds a name that is long or not ASCII. The header itself repeats the beginning of that
    name, with ? for letters that are not ASCII. Where one or two letters differ, one copy is damaged; where
    more differ, the writer shortens names in its own way. Without its extended header a name is incomplete.
    The end of a long name has no second copy.
    """
    raw = block[:100].rstrip(b"\0")
    if path is None:
        shortened = after_damage and (len(raw) == 100 or b"?" in raw)
        return "its name may be cut, for the header before it is damaged" if shortened else ""
    short = raw.decode("utf-8", "replace")
    differ = sum(a != b and a not in "?\ufffd" for a, b in zip(short, path, strict=False))
    if 0 < differ <= 2 and (len(raw) == 100 or len(short) == len(path)):
        return f"its name differs in {differ} letters from that of its extended header"
    return ""
