"""URLs in a config: where their shards' files lie, and that no file of a run has their passwords."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mm.config.data import storage_of
from mm.config.schema import Config, load_config, resolve_yaml, shown
from mm.data.storage import Storage
from mm.errors import DataError
from tests.pages import ROOT

URL = "https://user:PASSWORD@host/a-{0..1}.tar?sig=TOKEN"


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "digits.yaml", overrides)


def opened(cfg: Config) -> Storage:
    return storage_of(cfg.data)


def test_no_file_of_a_run_has_a_password(tmp_path: Path) -> None:
    cfg = config(f"data.train=['{URL}', 'data/x.tar']", f"run.dir={tmp_path}")
    for text in (resolve_yaml(cfg), yaml.safe_dump(shown(cfg))):
        assert "PASSWORD" not in text and "TOKEN" not in text
    train = yaml.safe_load(resolve_yaml(cfg))["data"]["train"]
    assert (
        train[0] == "https://host/a-{0..1}.tar" and (tmp_path / train[1]).resolve() == cfg.base / "data/x.tar"
    )
    assert cfg.data.train[0] == URL


def test_requests_have_them(tmp_path: Path) -> None:
    storage = opened(config(f"data.train=['{URL}']", f"data.remote.cache={tmp_path}"))
    assert storage.remote is not None
    assert storage.remote.client.secrets["https://host/a-1.tar"] == URL.replace("{0..1}", "1")
    assert "PASSWORD" not in repr(storage)


def test_without_a_cache_urls_are_refused_and_paths_are_not() -> None:
    storage = opened(config(f"data.train=['{URL}']"))
    with pytest.raises(DataError, match=r"https://host/a-.*needed: data\.remote\.cache=FOLDER") as raised:
        storage.find(URL)
    assert "PASSWORD" not in str(raised.value)
    assert storage.find(str(ROOT / "configs" / "data" / "*.tar"))
