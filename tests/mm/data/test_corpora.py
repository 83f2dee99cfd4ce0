"""Recipes of corpora, on miniature folders in the formats that they read."""

from __future__ import annotations

import io
import random
import sys
import tarfile
import wave
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.cli import main
from mm.config.schema import load_config
from mm.data.corpora import skimage, twemoji
from mm.data.corpora.pictures import stamped
from mm.data.corpora.recipes import prepare
from mm.data.corpora.skimage import lightness, split_pictures
from mm.data.corpora.speech import recording
from mm.data.corpora.split import groups, is_held_out
from mm.data.corpora.stamps import INSTALLED, Stamp, opened_stamps, read_stamps
from mm.data.corpora.tuxpaint import PLACEMENTS, RATE, SIDE, split_stamps
from mm.data.index import load_index
from mm.data.reader import ShardReader
from mm.data.sample import Sample, parse_segments
from mm.errors import DataError, Refused
from mm.plan.blueprint import draw_up
from tests.mm.harness import CONFIGS


def tone(n: int, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((np.sin(np.arange(n)) * 9000).astype("<i2").tobytes())
    return buffer.getvalue()


def picture(shade: int, size: tuple[int, int] = (20, 10), mode: str = "RGBA") -> Image.Image:
    colour = (shade, 255 - shade, 7, 255)
    return Image.new("RGBA", size, colour).convert(mode)


def stamps_folder(folder: Path, n: int = 40) -> Path:
    """As Debian's: n stamps with French and English recordings; the last four are linked, each otherwise."""
    for i in range(n):
        at = folder / ("animals/birds" if i % 2 else "food") / f"thing{i}.png"
        at.parent.mkdir(parents=True, exist_ok=True)
        picture(3 * i, mode="P" if i % 3 else "LA" if i % 2 else "RGBA").save(at)
        at.with_suffix(".txt").write_text(f"Thing {i}.\nfr.utf8=Chose nº {i}.\nxx.utf8=\n", "utf-8")
        for ending in ("", "_fr"):
            at.with_name(f"thing{i}_desc{ending}.wav").write_bytes(tone(900 + 2 * i + len(ending)))
    birds, food = folder / "animals/birds", folder / "food"
    (birds / f"thing{n - 1}.dat").write_text("nomirror\nscale 25%\n")
    same = (birds / f"thing{n - 1}_desc_fr.wav").read_bytes()  # a recording that two stamps share
    (food / f"thing{n - 2}_desc_fr.wav").write_bytes(same)
    (birds / f"thing{n - 3}.txt").write_text(f"thing {n - 2}.\nfr.utf8=Autre.\n", "utf-8")  # a name
    (food / f"thing{n - 4}.png").write_bytes((birds / f"thing{n - 3}.png").read_bytes())  # a picture
    (food / "unnamed.png").write_bytes((food / "thing0.png").read_bytes())  # no text: no stamp
    (food / "silent.txt").write_text("Nobody says this.\n")
    picture(9).save(food / "silent.png")
    (food / "thing0_desc_de.wav").write_bytes(tone(77))  # a language in which it has no name
    return folder


def made(out: Path, pattern: str) -> list[tuple[Sample, list[str], dict[str, bytes]]]:
    """Samples of shards with their texts and payloads."""
    reader, found = ShardReader(), []
    for sample in load_index([pattern], out).samples:
        written = parse_segments(reader.read(sample, sample.json))
        parts = {s.part.name: reader.read(sample, s.part) for s in sample.segments if s.part is not None}
        found.append((sample, [s.text for s in written if s.text is not None], parts))
    reader.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stamps_folder(tmp_path_factory.mktemp("stamps"))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    said = prepare("tuxpaint", out, folder, 0).summary
    assert "1 recordings without a text" in said
    assert said in (out / "ATTRIBUTION.md").read_text()
    return out


def test_every_stamp_and_every_recording_is_in_a_sample(folder: Path, shards: Path) -> None:
    stamps = {s.name: s for s in read_stamps(folder)}
    found = made(shards, "tuxpaint-*-??-*.tar")
    keys = {f"{language}/{s.name}" for s in stamps.values() for language in s.recordings}
    assert {sample.key for sample, _, _ in found} == keys - {"de/food/thing0"}
    for sample, texts, parts in found:
        language, _, name = sample.key.partition("/")
        assert texts == [f"{language}: {stamps[name].names[language]}"]
        assert [s.depends for s in sample.segments] == [None, None, "audio"]
        assert parts["speech.wav"] == stamps[name].recordings[language].read_bytes()
        assert f"-{language}-" in Path(sample.shard).name
    seen: dict[str, set[bytes]] = {}
    for sample, texts, parts in made(shards, "tuxpaint-*-pictures-*.tar"):
        stamp = stamps[sample.key.rpartition("_")[0]]
        assert texts == [stamp.category] and [s.depends for s in sample.segments] == [None, "vision"]
        assert sample.items("vision")[0].meta == {"height": SIDE, "width": SIDE, "channels": 3}
        seen.setdefault(stamp.name, set()).add(parts["picture.png"])
    assert set(seen) == set(stamps) and {len(papers) for papers in seen.values()} == {1, PLACEMENTS}
    assert load_index(["tuxpaint-train-fr-*.tar"], shards).samples[0].source == "tuxpaint-train-fr"


def test_no_name_picture_or_recording_is_in_both_splits(folder: Path, shards: Path) -> None:
    stamps = {s.name: s for s in read_stamps(folder)}
    marks: dict[str, set[object]] = {"train": set(), "eval": set()}
    for split, own in marks.items():
        for sample, texts, _ in made(shards, f"tuxpaint-{split}-??-*.tar"):
            own |= {texts[0].casefold(), sample.items("audio")[0].sha256, sample.key.partition("/")[2]}
        for sample, _, _ in made(shards, f"tuxpaint-{split}-pictures-*.tar"):
            own |= {stamps[sample.key.rpartition("_")[0]].picture.read_bytes()}
    assert marks["eval"] and not marks["train"] & marks["eval"]


@settings(max_examples=40)
@given(st.lists(st.sets(st.sampled_from("abcdefghij"), max_size=3), max_size=12))
def test_groups_are_the_connected_parts(marks: list[set[str]]) -> None:
    graph = nx.Graph()
    graph.add_nodes_from(range(len(marks)))
    graph.add_edges_from((i, j) for i in range(len(marks)) for j in range(i) if marks[i] & marks[j])
    expected = {i: min(part) for part in nx.connected_components(graph) for i in part}
    assert groups(marks) == [expected[i] for i in range(len(marks))]


def by_name(stamps: list[Stamp], seed: int) -> dict[str, str]:
    """The split of each stamp."""
    return dict(zip([s.name for s in stamps], split_stamps(stamps, seed), strict=True))


def test_linked_stamps_are_held_out_together_and_others_stay_where_they_are(folder: Path) -> None:
    stamps = read_stamps(folder)
    splits = [by_name(stamps, seed) for seed in range(9)]
    linked = ["animals/birds/thing39", "food/thing38", "animals/birds/thing37", "food/thing36"]
    assert all(len({split[name] for name in linked}) == 1 for split in splits)
    assert len({tuple(split.values()) for split in splits}) > 1
    alone = [s for s in stamps if s.name not in linked][::2]  # others come and go: these do not move
    assert by_name(alone, 0).items() <= splits[0].items()
    held_out = sum(is_held_out(str(i), 0, 0.125) for i in range(4000))
    assert abs(held_out - 500) < 4 * (4000 * 0.125 * 0.875) ** 0.5


def test_a_debian_package_is_its_folder(folder: Path, tmp_path: Path) -> None:
    package = tmp_path / "stamps.deb"
    package.write_bytes(b"!<arch>\n")
    add_member(package, "debian-binary", b"2.0")  # of an odd size, so that a byte follows it
    add_member(package, "control.tar.xz", b"")
    with tarfile.open(tmp_path / "data.tar.xz", "w:xz") as tar:
        tar.add(folder, f".{INSTALLED}")
    add_member(package, "data.tar.xz", (tmp_path / "data.tar.xz").read_bytes())
    with opened_stamps(package) as unpacked:
        assert [(s.name, s.mirror, s.names) for s in unpacked] == [
            (s.name, s.mirror, s.names) for s in read_stamps(folder)
        ]
        assert [s.name for s in unpacked if not s.mirror] == ["animals/birds/thing39"]


def add_member(package: Path, name: str, payload: bytes) -> None:
    """A file at the end of an ar archive."""
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(payload):<10}`\n"
    with package.open("ab") as f:
        f.write(header.encode() + payload + b"\n" * (len(payload) % 2))


def test_recipes_are_deterministic(folder: Path, shards: Path, tmp_path: Path) -> None:
    again = prepare("tuxpaint", tmp_path, folder, 0)
    assert again.shards and all(p.read_bytes() == (shards / p.name).read_bytes() for p in again.shards)


@pytest.mark.parametrize("size", [(30, 10), (7, 40), (64, 64), (200, 3)])
def test_a_stamp_lies_whole_on_its_paper(size: tuple[int, int]) -> None:
    for rng in (None, random.Random(1), random.Random(2)):
        paper = np.asarray(stamped(picture(0, size), 32, rng, True)).astype(int)
        assert paper.shape == (32, 32, 3)
        inked = np.argwhere(np.abs(paper - [0, 255, 7]).max(axis=2) < 3)
        down, across = inked.max(axis=0) - inked.min(axis=0) + 1
        longer, shorter = max(down, across), min(down, across)
        assert longer == 32 if rng is None else 32 * 0.65 - 1 <= longer <= 32
        assert abs(shorter - max(1, longer * min(size) / max(size))) <= 1
        assert (down >= across) == (size[1] >= size[0])


def test_what_is_transparent_is_white_paper() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert stamped(clear, 16).getextrema() == ((255, 255),) * 3


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="apt-get install tuxpaint-stamps-default"):
        prepare("tuxpaint", tmp_path, tmp_path, 0)
    (tmp_path / "a.deb").write_bytes(b"no package")
    with pytest.raises(DataError, match="neither a folder nor a Debian package"):
        prepare("tuxpaint", tmp_path, tmp_path / "a.deb", 0)
    (tmp_path / "a.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(DataError, match="without data"):
        prepare("tuxpaint", tmp_path, tmp_path / "a.deb", 0)
    with pytest.raises(Refused, match="takes no --from"):
        prepare("digits", tmp_path, tmp_path, 0)
    with pytest.raises(Refused, match="there is none"):
        prepare("tuxpaint", tmp_path, tmp_path / "none", 0)
    with pytest.raises(DataError, match="has 0 of scikit-image's pictures"):
        prepare("skimage", tmp_path, tmp_path, 0)
    for name, package in (("twemoji", "emoji"), ("digits", "sklearn.datasets")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(Refused, match=r"pip install -e '\.\[data\]'"):
            prepare(name, tmp_path, tmp_path if name == "twemoji" else None, 0)


def test_recordings_of_any_kind_become_wav(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.flac"), "w") as file:
        stream = file.add_stream("flac", rate=44100, layout="stereo")
        samples = (np.sin(np.arange(44100) * 0.05) * 2**14).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(
            np.stack([samples, samples], 1).reshape(1, -1), format="s16", layout="stereo"
        )
        frame.rate = 44100
        file.mux([p for packets in (stream.encode(frame), stream.encode(None)) for p in packets])
    with wave.open(io.BytesIO(recording(tmp_path / "a.flac", RATE))) as f:
        assert (f.getnchannels(), f.getsampwidth(), f.getframerate()) == (1, 2, RATE)
        heard = np.frombuffer(f.readframes(f.getnframes()), "<i2") / 2**14
    expected = np.sin(np.arange(RATE) * 0.05 * 44100 / RATE)
    assert abs(len(heard) - RATE) < 700 and np.abs(heard[800:15000] - expected[800:15000]).max() < 0.05
    (tmp_path / "b.wav").write_bytes(b"RIFF, cut off")
    with pytest.raises(ValueError, match="decoded"):
        recording(tmp_path / "b.wav", RATE)


def test_crops_say_what_can_be_told_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skimage, "SAMPLES", {"train": 30, "eval": 20})
    shades = dict(zip(list(skimage.LICENCES)[:6], (0, 50, 100, 150, 200, 250), strict=True))
    (tmp_path / "from").mkdir()
    for name, shade in shades.items():
        Image.new("L", (90, 200), shade).save(tmp_path / "from" / name)
    prepare("skimage", tmp_path, tmp_path / "from", 0)
    splits = split_pictures(list(shades), 0)
    assert [len(splits[s]) for s in ("train", "eval")] == [4, 2]
    for split, names in splits.items():
        seen = set()
        for _, texts, parts in made(tmp_path, f"skimage-{split}-*.tar"):
            crops = [Image.open(io.BytesIO(parts[name])) for name in ("a.png", "b.png")]
            levels = [lightness(crop) for crop in crops]
            assert [round(np.asarray(crop).mean()) * 10 // 256 for crop in crops] == levels
            answer = "same" if levels[0] == levels[1] else "other"
            assert "".join(texts) == f"light {levels[0]} and {levels[1]}, {answer} picture"
            seen |= set(levels)
        assert seen == {shades[name] * 10 // 256 for name in names}


def test_an_emoji_and_a_name_are_of_different_emojis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package emoji and without eSpeak NG: names and a voice are made up."""
    names = {chr(0x1F400 + i): f":Thing_{'abcdefghij'[i % 10]}{'abcdefghij'[i // 10]}:" for i in range(50)}
    names |= {"\U0001f468\u200d\u2696\ufe0f": ":man_judge:", "\U0001f469\u200d\u2696\ufe0f": ":woman_judge:"}
    data = {e: {"en": name, "status": 2} for e, name in names.items()}
    module = SimpleNamespace(EMOJI_DATA=data, STATUS={"fully_qualified": 2})
    monkeypatch.setitem(sys.modules, "emoji", module)
    monkeypatch.setattr(twemoji, "Speaker", lambda: SimpleNamespace(say=lambda *a: tone(len(a[0]))))
    (tmp_path / "from").mkdir()
    for e in list(names)[1:]:  # of the first there is no picture
        picture(90).save(tmp_path / "from" / f"{'-'.join(f'{ord(c):x}' for c in e)}.png")
    prepare("twemoji", tmp_path, tmp_path / "from", 0)
    shown: dict[str, set[str]] = {}
    for split in ("train", "eval"):
        found = [texts for _, texts, _ in made(tmp_path, f"twemoji-{split}-*.tar")]
        shown[split] = {texts[1] for texts in found}
        assert {texts[3] for texts in found} == shown[split]
        assert all("".join(t) == f"shows {t[1]}, says {t[3]}." for t in found)
    assert len(shown["train"] | shown["eval"]) == 51 and not shown["train"] & shown["eval"]
    assert shown["eval"] and len({"man judge", "woman judge"} & shown["train"]) in (0, 2)


def test_the_command_prints_shards_and_where_licences_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", "tuxpaint", "--out", str(tmp_path), "--from", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert sorted(out.split()) == sorted(map(str, tmp_path.glob("*.tar")))
    assert "ATTRIBUTION.md" in err and "held out" in err


@pytest.mark.parametrize("name", ["tuxpaint", "twemoji", "skimage"])
def test_each_has_a_job_whose_data_its_recipe_makes(name: str) -> None:
    """And the job can be laid out: sizes, ranks and keys are checked without data."""
    cfg = load_config(CONFIGS / f"{name}.yaml")
    draw_up(cfg, 4)
    assert cfg.data.made_by == f"python -m mm data prepare {name} --out build/corpora/{name}"
    assert all(f"build/corpora/{name}/{name}-" in pattern for pattern in (*cfg.data.train, *cfg.data.eval))
