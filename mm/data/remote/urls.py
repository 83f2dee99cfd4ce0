"""Names of remote shards: URLs, and what of them may be shown.

A name of a shard holds no secret: password and query are taken off, and only requests have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import braceexpand

from mm.errors import DataError

# By scheme, the package that its requests need; the extra `remote` installs them all.
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
TARGETS = ("s3", "gs", "file")  # schemes that copies of checkpoints may go to
# User and password: up to the last @ before the path, or, where a password with a slash is written as it is,
# from a colon that begins no port up to the next @.
_USER = r"(?:[^\s/'\"]*@|[^\s/:@'\"]*:(?!\d+(?:[/?#]|$))[^\s@'\"]*@)?"
_URL = re.compile(r"[a-zA-Z][\w+.-]*://[^\s'\"]*")


def is_remote(name: str) -> bool:
    """Whether a shard or a pattern is a URL, not a path on this machine."""
    return re.match(r"[a-zA-Z][\w+.-]+://", name) is not None


def scheme_of(name: str) -> str:
    """The scheme of a URL, in lower case."""
    return name.partition("://")[0].lower()


def public(url: str) -> str:
    """A URL without user, password, query and fragment; what is no URL as it is."""
    if not is_remote(url):
        return url
    scheme, _, rest = url.partition("://")
    if scheme.lower() in ("http", "https"):  # elsewhere ? and # are letters of a key, and ? one of a glob
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{scheme}://{re.sub(f'^{_USER}', '', rest)}"


def scrub(text: str) -> str:
    """Text, such as another package's error, with every URL in it made public."""
    return _URL.sub(lambda found: public(found[0]), text)


def all_public(value: Any) -> Any:
    """Plain data, such as a config, with every URL in it made public."""
    if isinstance(value, Mapping):
        return {key: all_public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [all_public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return public(value) if is_remote(value) else scrub(value)  # a command may have a URL in it


def urls_in(value: Any) -> list[str]:
    """Every URL in plain data."""
    if isinstance(value, Mapping):
        return [url for inner in value.values() for url in urls_in(inner)]
    if isinstance(value, list):
        return [url for inner in value for url in urls_in(inner)]
    return [value] if isinstance(value, str) and is_remote(value) else []


def secrets_of(patterns: Iterable[str]) -> Mapping[str, str]:
    """By public name, the URL to ask for, of the shards of the patterns whose URL has more than its name."""
    urls = [u for p in patterns if is_remote(p) for u in braceexpand.braceexpand(p, escape=False)]
    return {public(u): u for u in urls if public(u) != u}


def check(name: str) -> None:
    """Refuse a URL that cannot be read alike by all ranks and runs; raises DataError."""
    scheme, shown = scheme_of(name), public(name)
    if scheme not in PACKAGES and scheme != "memory":
        raise DataError(f"{shown}: unknown scheme {scheme}://; needed: one of {', '.join(PACKAGES)}")
    if shown != name and scheme not in ("http", "https"):
        raise DataError(
            f"{shown}: a password in the URL; needed: {scheme}://BUCKET/.., and the credentials where the "
            f"tools of that store keep them"
        )
    if scheme == "hf" and "@" not in shown:
        raise DataError(
            f"{shown}: no revision, and the files of a branch may change while a run goes on; needed: "
            "hf://datasets/OWNER/NAME@COMMIT/.."
        )


def check_target(url: str) -> None:
    """Refuse a URL that copies of checkpoints cannot go to; raises DataError."""
    scheme, shown = scheme_of(url), public(url)
    if not is_remote(url) or scheme not in TARGETS:
        raise DataError(
            f"{shown}: no store that checkpoints are copied to; needed: s3://BUCKET/FOLDER, "
            "gs://BUCKET/FOLDER or file:///FOLDER"
        )
    if shown != url:
        raise DataError(
            f"{shown}: a password in the URL; needed: {scheme}://BUCKET/.., and the credentials where the "
            "tools of that store keep them"
        )
    where, _, folder = url.partition("://")[2].partition("/")
    if (scheme == "file") == bool(where) or not folder.strip("/") or ".." in folder.split("/"):
        form = "file:///FOLDER" if scheme == "file" else f"{scheme}://BUCKET/FOLDER"
        raise DataError(f"{shown}: which folder is not said; needed: {form}, a folder of this run's own")
