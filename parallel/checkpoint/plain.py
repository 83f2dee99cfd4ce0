"""Whether a part of a checkpoint's file is one plain tensor, looked at before torch reads it.

torch.load(weights_only=True) runs no code of a file. But it makes what the file asks for: a bytearray of any
length, storages that are packed a thousand to one, tensors of its older formats. What torch saves of one
tensor is a zip of stored records, and a pickle of some 200 bytes that names a few things.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from typing import IO

ZIP = b"PK\x03\x04"  # what torch tells a zip by; it reads anything else in an older format
MOST_BYTES = 1 << 14  # of the pickle of one tensor
MOST_CALLS = 4  # a parameter and its tensor, each with an OrderedDict of hooks, which is empty
_CALLED = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",  # of dtypes that have no class of storages
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
}
_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINUNICODE", "NEWTRUE", "NEWFALSE", "NONE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


def why_not_plain(file: IO[bytes], start: int, length: int) -> str:
    """In words, why `length` bytes of a file are no plain tensor as torch.save writes one; "" where they are.

    Reads the list of its records and the pickle, not the data.
    """
    part = _Part(file, start, length)
    if part.read(len(ZIP)) != ZIP:
        return "it is no zip"
    try:
        with zipfile.ZipFile(part) as records:
            infos = records.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                return "it has packed records"
            if sum(info.file_size for info in infos) > length:
                return "its records are longer than it is"
            # torch finds records by names in any case
            if len({info.filename.lower() for info in infos}) < len(infos):
                return "it has two records of one name"
            pickles = [info for info in infos if info.filename.lower().endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MOST_BYTES:
                return "it has no pickle of a tensor's size"
            return next(_odd(records.read(pickles[0])), "")
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        return str(error)


def _odd(content: bytes) -> Iterator[str]:
    """What the pickle of one tensor does not have."""
    calls = 0
    for opcode, value, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            yield f"its pickle has the opcode {opcode.name}"
        if opcode.name == "GLOBAL" and value not in _CALLED and not _of_torch(str(value)):
            yield f"it names {str(value).replace(' ', '.')}"
        calls += opcode.code == pickle.REDUCE.decode("latin-1")
    if calls > MOST_CALLS:
        yield f"its pickle makes {calls} objects"


def _of_torch(name: str) -> bool:
    """Whether a name is that of a class of storages, or of a dtype: plain words, which nothing is made of."""
    module, _, what = name.partition(" ")
    if module == "torch.storage":
        return what == "UntypedStorage"
    return module == "torch" and (what.endswith("Storage") or what.islower()) and what.isidentifier()


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the part."""
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, begin + offset)
        return self._at

    def tell(self) -> int:
        """The place in the part."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read on, to the end of the part at most."""
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data
