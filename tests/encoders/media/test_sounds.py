"""Sounds of every format: the count of the probe is that of decoding, and both are another decoder's."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.media.decode import read_sound
from encoders.media.probe import probe_media
from mm.data.building import current_indexes
from mm.data.index import load_index
from mm.data.probes import metadata
from tests.encoders.helpers import wav
from tests.encoders.media.made import by_av, by_soundfile, film, noise, shades
from tests.mm.shards import write_shard

soundfile: Any = pytest.importorskip("soundfile")
av: Any = pytest.importorskip("av")

WAVS = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
FORMS = [("WAV", s) for s in WAVS] + [("WAVEX", "PCM_16"), ("WAVEX", "FLOAT"), ("RF64", "PCM_16")]
FORMS += [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
FORMS += [("MP3", "MPEG_LAYER_III")]


def by_ffmpeg(payload: bytes) -> np.ndarray:
    """Mono samples of a file as FFmpeg decodes it."""
    parts = []
    with av.open(io.BytesIO(payload)) as container:
        resampler = av.AudioResampler("fltp")
        for frame in container.decode(audio=0):
            parts += [piece.to_ndarray().mean(axis=0) for piece in resampler.resample(frame)]
    return np.concatenate(parts)


@pytest.mark.parametrize(("form", "subtype"), FORMS)
def test_counts_and_samples_are_those_of_two_decoders(form: str, subtype: str) -> None:
    for rate, channels, n in ((8000, 1, 997), (48000, 2, 12345), (16000, 2, 8001)):
        payload = by_soundfile(noise(n, channels), rate, form, subtype)
        meta = probe_media(payload)
        samples, found = read_sound(payload)
        assert meta == {"samples": n, "rate": rate} and found == rate and len(samples) == n
        theirs, _ = soundfile.read(io.BytesIO(payload), dtype="float32", always_2d=True)
        assert len(theirs) == n
        assert np.abs(samples.numpy() - theirs.mean(axis=1)).max() < 1e-5
        if form != "OGG" and subtype != "OPUS":  # FFmpeg keeps too much of short Vorbis; its Opus has 48 kHz
            other = by_ffmpeg(payload)
            assert len(other) == n and np.abs(samples.numpy() - other).max() < 1e-5
        elif subtype == "VORBIS":
            assert np.abs(samples.numpy() - by_ffmpeg(payload)[:n]).max() < 1e-5


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("form", "codec", "rate"), [("ogg", "libopus", 48000), ("mp3", "libmp3lame", 22050)])
def test_what_ffmpeg_has_written_is_whole(form: str, codec: str, rate: int, channels: int) -> None:
    """Delay and padding of the encoder are gone, as the LAME tag and RFC 7845 say."""
    for n in (100, 5000, 23456):
        x = noise(n, channels)
        payload = by_av(x, rate, form, codec)
        samples, found = read_sound(payload)
        assert probe_media(payload) == {"samples": n, "rate": rate}
        assert (len(samples), found) == (n, rate)
        if n < 20_000:
            continue  # below: no shift, it is most alike where it is
        change, heard = np.diff(x.mean(axis=1)), np.diff(samples.numpy())
        alike = [np.dot(change[5000:15000], heard[5000 + k : 15000 + k]) for k in range(-50, 51)]
        assert int(np.argmax(alike)) == 50


def test_an_mp3_without_an_index_is_heard_to_its_end() -> None:
    """libsndfile guesses its length from its first frame: at a variable rate it would stop early."""
    x = np.zeros((60_000, 1))
    x[:20_000] = np.random.default_rng(0).standard_normal((20_000, 1)) * 0.3
    payload = by_av(x, 16000, "mp3", "libmp3lame", write_xing="0", id3v2_version="0")
    meta = probe_media(payload)
    assert meta["samples"] >= 60_000 and meta["samples"] % 576 == 0
    assert len(read_sound(payload)[0]) == meta["samples"] == len(by_ffmpeg(payload))
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + b"\0" * 10 + payload
    assert probe_media(tagged) == meta


@pytest.mark.parametrize(("form", "codec"), [("mp4", "aac"), ("matroska", "libopus"), ("webm", "libopus")])
def test_the_sound_of_containers(form: str, codec: str) -> None:
    payload = by_av(noise(30_000, 2), 48000, form, codec)
    meta = probe_media(payload)
    samples, rate = read_sound(payload)
    assert meta == {"samples": len(samples), "rate": rate} and rate == 48000
    assert np.array_equal(samples.numpy(), by_ffmpeg(payload)) and 0 <= len(samples) - 30_000 <= 2048


def test_wav_of_every_width_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("soundfile", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    for width in (1, 2, 3, 4):
        payload = wav(100, rate=16000, width=width, channels=2)
        samples, rate = read_sound(payload)
        assert samples.shape == (100,) and rate == 16000 and samples.abs().max() <= 1
        assert probe_media(payload) == {"samples": 100, "rate": 16000}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    flac, mp3 = by_soundfile(noise(9), 8000, "FLAC", "PCM_16"), by_av(noise(9), 8000, "mp3", "libmp3lame")
    mp4 = film(shades(2))
    for name in ("soundfile", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    for payload, name in ((flac, "soundfile"), (mp3, "av"), (mp4, "av")):
        with pytest.raises(ValueError, match=f"package {name}, which is missing.*pip install polyrank.media"):
            probe_media(payload)


def test_an_index_made_without_a_package_is_made_again_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = by_soundfile(noise(9), 8000, "FLAC", "PCM_16")
    flac: dict[str, Any] = {"key": "a", "segments": [{"audio": "a.flac"}], "parts": {"a.flac": payload}}
    plain: dict[str, Any] = {"key": "b", "segments": [{"audio": "b.wav"}], "parts": {"b.wav": wav(9)}}
    shard = write_shard(tmp_path / "a.tar", [flac, plain])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "soundfile", None)
        index = load_index(["a.tar"], tmp_path)
    assert [s.key for s in index.samples] == ["b"]
    assert "a.flac: FLAC, Ogg" in index.broken[0].why and "pip install" in index.broken[0].why
    assert not current_indexes([str(shard)])
    assert [s.key for s in load_index(["a.tar"], tmp_path).samples] == ["a", "b"]
    assert list(current_indexes([str(shard)])) == [str(shard)]


def test_content_counts_and_not_the_extension() -> None:
    payloads = {"flac": by_soundfile(noise(50), 8000, "FLAC", "PCM_16"), "wav": wav(50)}
    for payload in payloads.values():
        for extension in ("wav", "flac", "mp3", "ogg"):
            assert metadata(extension, payload) == {"samples": 50, "rate": 8000}


def test_headers_that_promise_more_than_there_is() -> None:
    payload = wav(1000, width=2)
    with pytest.raises(ValueError, match="a WAV of 500 samples, its header says 1000"):
        probe_media(payload[:-1000])
    streamed = bytearray(payload)  # written by a program that did not know its length
    streamed[40:44] = struct.pack("<I", 2**32 - 1)
    streamed[4:8] = struct.pack("<I", 2**32 - 1)
    assert probe_media(bytes(streamed)) == {"samples": 1000, "rate": 8000}
    assert len(read_sound(bytes(streamed))[0]) == 1000
    flac = by_soundfile(noise(20_000), 8000, "FLAC", "PCM_16")
    assert probe_media(flac[: len(flac) // 2])["samples"] == 20_000
    with pytest.raises(ValueError, match="the sound cannot be decoded"):
        read_sound(flac[: len(flac) // 2])


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_sound_of_no_samples_has_none(subtype: str) -> None:
    payload = by_soundfile(np.zeros((0, 1)), 8000, "WAV", subtype)
    assert probe_media(payload) == {"samples": 0, "rate": 8000}
    assert len(read_sound(payload)[0]) == 0
