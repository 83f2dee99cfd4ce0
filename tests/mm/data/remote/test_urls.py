"""What of a URL is shown, and which URLs are taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.remote.urls import check, is_remote, public, scrub, secrets_of
from mm.errors import DataError

LETTERS = st.sampled_from(["", "a", "a%40b", "x:y", "+-_.~", "a/b", "9=&c"])

KEYS = st.sampled_from(["a", "a/b-0.tar", "{0..1}.tar"])


@settings(max_examples=40)
@given(
    user=st.sampled_from(["", "a%40b"]),
    password=LETTERS,
    token=LETTERS,
    key=st.sampled_from(["a", "a/b-0.tar", "{0..1}.tar"]),
)
def test_no_secret_is_in_a_public_name_or_a_scrubbed_text(
    user: str, password: str, token: str, key: str
) -> None:
    marked = f"USER{user}", f"PASS{password}", f"TOKEN{token}"
    url = f"https://{marked[0]}:{marked[1]}@host.org/{key}?sig={marked[2]}&x=1#f"
    assert public(url) == f"https://host.org/{key}"
    shown = scrub(f"GET '{url}' failed, then {url}")
    assert not any(secret in shown for secret in marked)
    assert shown.count(f"https://host.org/{key}") == 2


@pytest.mark.parametrize(
    "name",
    ["s3://bucket/a?b.tar", "s3://bucket/a#1.tar", "hf://datasets/o/n@main/x.tar", "data/x.tar"],
)
def test_a_name_without_secrets_stays(name: str) -> None:
    assert public(name) == name


def test_paths_are_not_urls() -> None:
    assert [is_remote(p) for p in ("data/x.tar", "/data/x.tar", "C:\\x", "s3://b/k", "HTTPS://h/k")] == [
        *(False, False, False),
        *(True, True),
    ]


def test_secrets_are_found_by_public_name_after_braces() -> None:
    found = secrets_of(["https://u:p@h/s-{0..1}.tar?sig=a", "https://h/open.tar", "data/*.tar"])
    assert found == {f"https://h/s-{k}.tar": f"https://u:p@h/s-{k}.tar?sig=a" for k in (0, 1)}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x.tar", "unknown scheme ftp://"),
        ("s3://KEY:SECRET@bucket/x.tar", "a password in the URL"),
        ("hf://datasets/o/n/x.tar", "needed: hf://datasets/OWNER/NAME@COMMIT/"),
    ],
)
def test_a_url_that_cannot_be_read_alike_is_refused_without_its_password(url: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        check(url)
    assert "SECRET" not in str(raised.value)
