"""What becomes of samples that do not fit: refused with all counts, left out or cut, on all ranks alike."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.cli import main
from mm.config.schema import from_mapping
from mm.data.encode import TokenSegment, encode_samples, parse_sample
from mm.data.index import load_index
from mm.data.inspect import count_lines
from mm.data.reader import ShardReader
from mm.data.sample import Index, Sample
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError
from mm.order.stream import Stream
from mm.plan.batches import Batches
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.inputs import sample_length, supervised_tokens
from mm.plan.select import lost_samples
from mm.plan.step_plan import plan_step
from mm.ranks.batch import Assembler
from mm.ranks.decoding import Task
from mm.ranks.feed import Feed, FeedOptions
from mm.ranks.job import open_index
from mm.report.plan_json import first_step
from mm.train.evaluate import blind_guess
from parallel.boundary import PlanCache
from tests.mm.harness import small
from tests.mm.shards import write_shard


def picture(height: int, width: int, grey: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width), grey, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, words: str, *sizes: tuple[int, int], **more: Any) -> dict[str, Any]:
    parts = {f"i{k}.png": picture(*size) for k, size in enumerate(sizes)}
    segments: list[dict[str, Any]] = [{"vision": name} for name in parts]
    return {"key": key, "segments": [*segments, {"text": words, **more}], "parts": parts}


# 2 markers, 4 rows a picture of 8x8 and 6 of 8x12, a token a byte. One sample is odd, two are long.
FINE = [sample(f"f{k:02d}", "abcd"[: k % 3 + 2], (8, 8)) for k in range(17)]
ODD = sample("odd", "ab", (8, 8), (7, 9))
LONG = sample("long", "x" * 30, (8, 8))
LONGER = sample("longer", "y" * 20 + "z" * 10, (8, 12), (8, 8))
ALL = [*FINE[:5], ODD, *FINE[5:9], LONG, *FINE[9:], LONGER]


def blueprint(**data: Any) -> Blueprint:
    raw = small(data={"train": ["a-*.tar"], "context": 20, **data}, train={"global_batch": 4})
    return draw_up(from_mapping(raw, Path()), 1)


def chosen(folder: Path, samples: list[dict[str, Any]], **data: Any) -> Index:
    write_shard(folder / "a-0.tar", samples)
    made = blueprint(**data)
    return open_index(made, made.cfg.data.train, folder)


def refusal(folder: Path, samples: list[dict[str, Any]], **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        chosen(folder, samples, **data)
    return str(caught.value)


def test_what_does_not_fit_is_refused_with_all_counts(tmp_path: Path) -> None:
    said = refusal(tmp_path, ALL)
    for words in (
        "i1.png of sample odd of",
        "does not fit model.vision: image of 7x9",
        "1 of 20 samples have an item that does not fit; or leave them out: data.misfit=skip with data.max",
        "2 of 20 samples are longer than data.context: the longest is sample longer of",
        "with 42 tokens, the first sample long with 36; raise data.context to 42",
        "or split them: data.overlong=split; or keep their beginnings: data.overlong=truncate; or leave",
        "them out: data.overlong=skip with data.max_skipped=",
    ):
        assert words in said, words


def test_the_context_that_is_named_is_enough(tmp_path: Path) -> None:
    samples = [s for s in ALL if s is not ODD]
    said = refusal(tmp_path, samples)
    assert "data.context to 42" in said
    share = float(said.rpartition("data.max_skipped=")[2])
    assert len(chosen(tmp_path, samples, overlong="skip", max_skipped=share).skipped) == 2
    assert "skip" not in refusal(tmp_path, [ODD]) and "skip" not in refusal(tmp_path, [LONG])
    assert not chosen(tmp_path, samples, context=42).skipped
    assert refusal(tmp_path, samples, context=41)


def test_more_than_the_bound_is_refused_and_the_share_that_is_named_is_enough(tmp_path: Path) -> None:
    skip = {"misfit": "skip", "overlong": "skip"}
    said = refusal(tmp_path, ALL, **skip)
    assert "3 of 20 samples are lost or left out, data.max_skipped is 0.01" in said
    assert "2 overlong in" in said and "1 misfit in" in said and "image of 7x9" in said
    share = float(said.rpartition("data.max_skipped=")[2])
    index = chosen(tmp_path, ALL, max_skipped=share, **skip)
    assert {index.samples[i].key: kind for i, (kind, _) in index.skipped.items()} == {
        "odd": "misfit",
        "long": "overlong",
        "longer": "overlong",
    }
    refusal(tmp_path, ALL, max_skipped=share - 1e-4, **skip)
    assert "all 1 samples are left out" in refusal(tmp_path, [ODD], max_skipped=1.0, **skip)


def test_samples_that_are_left_out_move_no_other(tmp_path: Path) -> None:
    index = chosen(tmp_path, ALL, misfit="skip", overlong="skip", max_skipped=0.2)
    assert [s.id for s in index.samples] == list(range(20)) and len(index.usable) == 17
    batches = Batches(Stream.whole(3, 20), 4)
    feed = Feed(index, None, None, FeedOptions(batches, prefetch=1), bad=[7])  # type: ignore[arg-type]
    assert feed.bad == {7, *index.skipped}
    feed.close()
    for step in range(5):
        all_of_them = batches.ids(step).tolist()
        ours = batches.ids(step, index.skipped).tolist()
        assert all(a == b for a, b in zip(all_of_them, ours, strict=True) if a not in index.skipped)
        assert not set(ours) & set(index.skipped)
    first = first_step(blueprint(), index).sample_ids
    assert first == tuple(Batches(Stream.whole(1, 20), 4).ids(0, index.skipped).tolist())


def test_damage_counts_against_the_same_bound(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a-0.tar", FINE)
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.index(b"f03.json")] ^= 1
    shard.write_bytes(bytes(damaged))
    made = blueprint()
    with pytest.raises(
        DataError, match=r"of 1\d samples are lost or left out, .* unreadable in .*a-0\.tar"
    ) as e:
        open_index(made, made.cfg.data.train, tmp_path)
    share = float(str(e.value).rpartition("data.max_skipped=")[2])
    made = blueprint(max_skipped=share)
    index = open_index(made, made.cfg.data.train, tmp_path)
    assert "f03" not in [s.key for s in index.samples] and len(index.samples) == 16
    lines = count_lines("training", index)
    assert lines[0] == "training data: 16 samples, 16 vision items in 1 files"
    assert any("unreadable" in line and "header at byte" in line for line in lines)


def test_a_torn_shard_counts_as_a_whole_one(tmp_path: Path) -> None:
    for k in range(4):
        shard = write_shard(tmp_path / f"a-{k}.tar", FINE)
    assert lost_samples(load_index(["a-*.tar"], tmp_path)) == 0
    shard.write_bytes(shard.read_bytes()[: 30 * 1024])
    index = load_index(["a-*.tar"], tmp_path)
    assert index.torn == (str(shard),)
    kept = len(index.samples) - 3 * 17
    assert 0 < kept < 17 and lost_samples(index) >= 17 - kept
    assert any(line.endswith("torn") for line in count_lines("training", index))


def test_long_samples_are_truncated_to_their_beginning(tmp_path: Path) -> None:
    index = chosen(tmp_path, [s for s in ALL if s is not ODD], overlong="truncate")
    made = blueprint()
    truncated = {s.key: s for s in index.samples if s.truncated}
    assert sorted(truncated) == ["long", "longer"] and not index.skipped
    assert [s.tokens for s in truncated["long"].segments] == [0, 14]  # 20 - 2 markers - 4 rows
    assert [s.tokens for s in truncated["longer"].segments] == [0, 0, 8]
    for s in truncated.values():
        assert sample_length(s, made.inputs) == 20
        assert supervised_tokens(s, made.inputs) == s.segments[-1].tokens  # and no end marker
    assert index.digest == load_index(["a-*.tar"], tmp_path).digest


def test_the_tensors_of_truncated_samples_are_beginnings(tmp_path: Path) -> None:
    index = chosen(tmp_path, [LONG, LONGER], overlong="truncate")
    made = blueprint()
    reader, tok = ShardReader(), Tokenizer()
    assembler = Assembler(
        inputs=made.inputs,
        reader=reader,
        tokenizer=tok,
        rank=0,
        dtype=torch.float64,
        device=torch.device("cpu"),
        axes={},
        sink="llm",
        row_shapes={},
        plans=PlanCache(0),
    )
    for s, words in zip(index.samples, (b"x" * 14, b"y" * 8), strict=True):
        ids, labels = np.full(20, -1), np.full(20, -100)
        written = assembler.decode(Task("", s, s.json))
        assert isinstance(written, list)
        assembler._write_sample(s, written, 0, ids, labels, {})
        assert ids[0] == tok.bos and ids[-1] == tok.eos and not (ids < 0).any()
        assert bytes(ids[ids < 256].tolist()) == words == bytes(labels[labels >= 0].tolist())
        plan = plan_step(0, [s], made.inputs)
        assert plan.supervised == (labels >= 0).sum()
    reader.close()


def test_a_sample_of_which_nothing_is_learned_is_left_out(tmp_path: Path) -> None:
    samples = [*FINE, sample("all", "abc", *[(8, 12)] * 4)]
    index = chosen(tmp_path, samples, overlong="truncate", max_skipped=0.1)
    assert [index.samples[i].key for i in index.skipped] == ["all"]


def test_modules_that_the_model_lacks_and_modules_without_data_are_named(tmp_path: Path) -> None:
    said = refusal(tmp_path, [*FINE, sample("t", "ab", depends="visoin")])
    assert "sample t of" in said and "text that depends on module 'visoin', which the model lacks" in said
    odd = sample("t", "ab", depends="visoin")
    index = chosen(tmp_path, [*FINE, odd], misfit="skip", max_skipped=0.1)
    assert [index.samples[i].key for i in index.skipped] == ["t"]
    index = chosen(tmp_path, FINE)
    lines = count_lines("training", index, ["vision", "audio"])
    assert lines[-1] == "warning: no sample has an item for module audio: it learns nothing"
    assert "warning" not in "".join(lines[:-1])


def test_counts_tell_files_items_and_reasons(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-1.tar", FINE)
    index = chosen(tmp_path, ALL, misfit="skip", overlong="truncate", max_skipped=0.5)
    lines = count_lines("training", index)
    assert lines[0] == "training data: 36 samples, 37 vision items in 2 files"
    assert lines[1].endswith("a-0.tar: 19 samples, 20 vision items, 1 left out, 2 truncated to data.context")
    assert lines[2].startswith("    misfit: i1.png of sample odd")
    assert lines[3].endswith("a-1.tar: 17 samples, 17 vision items") and len(lines) == 4


def test_a_script_that_makes_the_data_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).resolve().parents[3]
    missing = "data.train=[../runs/none/*.tar]"
    assert main(["train", str(root / "configs" / "many-images.yaml"), missing, "--dry-run"]) == 3
    assert "python -m benchmarks.placement.many_images" in capsys.readouterr().err


def test_the_blind_guess_is_the_entropy_of_what_depends(tmp_path: Path) -> None:
    samples = [sample(f"s{k}", "ab"[k % 2], depends="vision") for k in range(12)]
    samples += [sample(f"t{k}", f"caption {k}", depends="audio") for k in range(12)]
    samples += [sample("u", "never", depends="vision", loss=False)]
    write_shard(tmp_path / "a.tar", samples)
    reader = ShardReader()

    def encoded(found: Sample) -> tuple[TokenSegment, ...]:
        segments = encode_samples([parse_sample(reader.read(found, found.json))], Tokenizer())[0]
        assert not isinstance(segments, str)
        return segments

    found = blind_guess(load_index(["a.tar"], tmp_path).samples, encoded)
    reader.close()
    assert found == {"vision": pytest.approx(np.log(2), rel=1e-12)}
