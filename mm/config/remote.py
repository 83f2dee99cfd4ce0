"""The config of what is not on this machine: shards (`data.remote`), copies of checkpoints
(`checkpoint.remote`)."""

from __future__ import annotations

from pydantic import Field

from mm.config.build import LONGEST_S, Line, Section


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
        30.0,
        gt=0,
        le=LONGEST_S,
        description="longest wait for an answer, in seconds; a request is tried up to six times",
    )


class CopyConfig(Section):
    """Copies of a run's checkpoints in a store."""

    url: Line | None = Field(
        None,
        min_length=1,
        description="folder of this run's own that checkpoints are copied to beside training, and fetched "
        "from where run.dir has no newer one: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER",
    )
    keep: int | None = Field(
        None, ge=0, description="newest checkpoints that stay there, 0 for all; by default checkpoint.keep"
    )
    wait_s: float = Field(
        60.0,
        ge=0,
        le=LONGEST_S,
        description="longest wait for the last copy at the end of a run or at SIGTERM, in seconds",
    )
    bytes_per_s: int = Field(0, ge=0, description="most bytes a second that are sent; 0: as many as go")
    timeout_s: float = Field(
        30.0,
        gt=0,
        le=LONGEST_S,
        description="longest wait for an answer, in seconds; a request is tried up to six times",
    )
