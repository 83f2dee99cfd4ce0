"""The data section of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mm.config.build import LONGEST_S, Section
from mm.config.remote import RemoteConfig
from mm.config.sources import Entry, LengthsConfig, WeightsConfig
from mm.config.synthetic import SyntheticConfig
from mm.data.remote.urls import urls_in
from mm.data.storage import Storage


class LimitsConfig(Section):
    """Largest sizes of an item; by default those that an index takes (encoders/media/limits.py)."""

    pixels: int = Field(
        89_478_485,
        ge=1,
        le=89_478_485,
        description="most pixels of a picture, or of a frame of a video",
    )
    frames: int = Field(2**20, ge=1, le=2**20, description="most frames of a video")
    samples: int = Field(2**29, ge=1, le=2**29, description="most samples of a sound, for each channel")
    bytes: int = Field(2**31, ge=1, le=2**31, description="most bytes of an item's file")


class DataConfig(Section):
    """The samples."""

    train: list[Entry] = Field(
        min_length=1,
        description="patterns of the training shards, from the config's folder, or mappings: sources",
    )
    eval: list[Entry] = Field(
        [], description="patterns of the held-out shards, from the config's folder, or mappings: sources"
    )
    weights: list[WeightsConfig] = Field(
        [],
        description="a schedule of weights: mappings, in order of their samples",
    )
    lengths: list[LengthsConfig] = Field(
        [],
        description="a curriculum: up to a sample of the run only short samples are drawn; mappings, in "
        "order",
    )
    layout: str | dict[str, Any] | None = Field(
        None,
        description="how samples are written: a name, a mapping of fields or module:function; null for what "
        "each looks like",
    )
    made_by: str | None = Field(
        None, description="command that makes the shards, named in the error where one is missing"
    )
    overlong: Literal["refuse", "skip", "truncate", "split"] = Field(
        "refuse",
        description="samples longer than data.context: refuse, skip, truncate to their beginning, without "
        "the end marker, or split into portions that are samples of their own",
    )
    misfit: Literal["refuse", "skip"] = Field(
        "refuse",
        description="samples with an item that its encoder cannot take, such as a picture of an odd size: "
        "refuse or skip",
    )
    max_skipped: float = Field(
        0.01,
        ge=0,
        le=1,
        description="largest share of samples that may be unreadable or skipped, of all and of the last "
        "1,000 that were drawn; a torn shard counts as a whole one",
    )
    limits: LimitsConfig = LimitsConfig()
    tokenizer: str = Field(
        "bytes",
        description="the tokenizer: bytes, or a folder with tokenizer.json, or such a file, from the working "
        "folder",
    )
    context: int = Field(256, ge=3, description="length of the longest sample, in tokens")
    pack: int | None = Field(
        None,
        ge=3,
        description="length of packed sequences, in tokens, at least data.context; train.global_batch then "
        "counts packed sequences, so that a step has a budget of tokens",
    )
    skip: list[int | str] = Field(
        [],
        description="batches that are left out, counted from 1: 7, or 7-9 for a range; each step then takes "
        "the next batch that is not",
    )
    window: int = Field(
        8192, ge=1, description="samples that are packed together, with data.pack; more pack better"
    )
    prefetch: int = Field(2, ge=1, description="steps that are read ahead")
    remote: RemoteConfig = RemoteConfig()
    synthetic: SyntheticConfig | None = Field(
        None,
        description="made-up samples, all alike, that plan and train --virtual take in the place of "
        "data.train",
    )
    workers: int = Field(
        0, ge=0, description="processes of each rank that read and decode ahead; 0: a thread of the rank does"
    )
    item_timeout_s: float = Field(
        30.0,
        gt=0,
        le=LONGEST_S,
        description="longest time that a worker may take for one item, in seconds",
    )


def storage_of(data: DataConfig) -> Storage:
    """What reads the shards of a config's data."""
    remote, urls = data.remote, urls_in(data.model_dump(mode="json"))
    return Storage.of(urls, remote.cache, remote.cache_bytes, remote.timeout_s)
