"""The config of shards that are not on this machine: `data.remote`."""

from __future__ import annotations

from pydantic import Field

from mm.config.build import Section


class RemoteConfig(Section):
    """Shards at s3://, gs://, https:// and hf://."""

    cache: str | None = Field(
        None,
        min_length=1,
        description="folder on this machine for indexes and blocks of remote shards, from the working "
        "folder; needed where a shard is a URL",
    )
    cache_bytes: int = Field(
        10 << 30,
        ge=0,
        description="most bytes of blocks that stay in the cache; 0: none stay, only what is used is read",
    )
    timeout_s: float = Field(
        30.0, gt=0, description="longest wait for an answer, in seconds; a request is tried up to six times"
    )
