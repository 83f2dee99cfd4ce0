"""Faults in `mm/data/remote`."""

from __future__ import annotations

from tests.mutations.fault import Fault

REMOTE = (
    Fault(
        "remote.short",
        "an answer of a store that ends early passes as whole",
        "mm/data/remote/client.py",
        "if len(got) != size:",
        "if len(got) > size:",
        "tests/mm/data/remote/test_shards.py",
    ),
    Fault(
        "remote.version",
        "blocks of an object stay in the cache when it changes",
        "mm/data/remote/cache.py",
        'f"{name}\\0{version}\\0{number}"',
        'f"{name}\\0{number}"',
        "tests/mm/data/remote/test_cache.py",
    ),
    Fault(
        "remote.sum",
        "a block of the cache is believed without its sum",
        "mm/data/remote/cache.py",
        "if len(data) == size and _digest(data) == entries[at + _SUM : at + _ENTRY]:",
        "if len(data) == size:",
        "tests/mm/data/remote/test_cache.py",
    ),
    Fault(
        "remote.secret",
        "a password in a URL goes into config.yaml and checkpoints",
        "mm/config/schema.py",
        "all_public(resolve(cfg))",
        "resolve(cfg)",
        "tests/mm/config/test_remote.py",
    ),
)
