"""Shards of a web server whose certificate is signed by somebody of one's own."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mm.data.remote.server import files, serving
from tests.pages import ROOT

DATA = random.Random(0).randbytes(100_000)
READ = """
import sys
from mm.data.remote.shards import RemoteShards
remote = RemoteShards.of(__import__("pathlib").Path(sys.argv[1]), 0)
print(remote.read(sys.argv[2], 70_000, 6).hex())
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="aiohttp is in the extra remote")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_of_ones_own_is_trusted_where_it_is_named(tmp_path: Path, processes: None) -> None:
    key, signed = tmp_path / "key.pem", tmp_path / "signed.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=here"
    make += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", signed], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(signed, key)
    with serving(files({"/s.tar": DATA}), tls=context) as server:
        # The certificates are read when the client package is imported, so each has a process of its own.
        command = [sys.executable, "-c", READ, str(tmp_path), f"{server.url}/s.tar"]
        found = [
            subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True)
            for more in ({"SSL_CERT_FILE": str(signed)}, {})
        ]
    assert found[0].stdout.strip() == DATA[70_000:70_006].hex(), found[0].stderr
    said = found[1].stderr
    assert f"{server.url}/s.tar: " in said and "needed: the certificate of who signed it" in said
    assert "attempt 2" not in said, "it would fail again"
