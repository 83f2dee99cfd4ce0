"""Faults of checkpoints: how they are written beside training, which stay, what is trusted."""

from __future__ import annotations

from tests.mutations.fault import Fault

SAVER = "tests/mm/checkpoint/test_saver.py"
LISTED = "tests/mm/checkpoint/test_listed.py"
HOSTILE = "tests/mm/checkpoint/test_hostile.py"
SUMS = "tests/mm/checkpoint/test_sums.py"

CHECKPOINTS = (
    Fault(
        "checkpoint.left",
        "what is half written of a checkpoint stays on a full disk",
        "mm/checkpoint/saver.py",
        "shutil.rmtree(store.partial_of(self._directory, step), ignore_errors=True)",
        "pass",
        f"{SAVER}::test_what_one_rank_cannot_write_is_told_on_all_and_removed",
    ),
    Fault(
        "checkpoint.told",
        "ranks other than the one that failed are not told why",
        "mm/checkpoint/saver.py",
        "said = job.control.tell(why)",
        "said = [why for _ in job.control.tell(why)]",
        f"{SAVER}::test_what_one_rank_cannot_write_is_told_on_all_and_removed",
    ),
    Fault(
        "checkpoint.copied",
        "a checkpoint is written of memory that nothing was copied to",
        "mm/checkpoint/saver.py",
        "torch._foreach_copy_(self._staged, self._items, non_blocking=True)",
        "pass",
        f"{SAVER}::test_it_holds_the_step_that_it_was_begun_at",
    ),
    Fault(
        "checkpoint.best",
        "the worst checkpoint is kept for the best",
        "mm/checkpoint/kept.py",
        "best = min(metrics, key=lambda s: (metrics[s], s), default=None)",
        "best = max(metrics, key=lambda s: (metrics[s], s), default=None)",
        LISTED,
    ),
    Fault(
        "checkpoint.whole",
        "prune removes the newest checkpoint that is whole",
        "mm/checkpoint/listed.py",
        "if whole is not None and not why[whole]:",
        "if False:",
        f"{LISTED}::test_a_run_is_listed_and_pruned",
    ),
    Fault(
        "checkpoint.size",
        "a tensor may be said to be larger than the file that it is in",
        "parallel/checkpoint/metadata.py",
        "if where.length < math.prod(chunk.sizes) * tensor.properties.dtype.itemsize:",
        "if False:",
        HOSTILE,
    ),
    Fault(
        "checkpoint.links",
        "files of a checkpoint may be links to others",
        "parallel/checkpoint/manifest.py",
        'links = [p for p in folder.rglob("*") if p.is_symlink()]',
        "links = list[Path]()",
        HOSTILE,
    ),
    Fault(
        "checkpoint.holes",
        "every rank sums up a file of holes",
        "parallel/checkpoint/manifest.py",
        "or hollow(folder / name):",
        "or False:",
        f"{HOSTILE}::test_no_rank_sums_up_holes",
    ),
    Fault(
        "checkpoint.whole_file",
        "a file that does not fit on the disk is lost",
        "parallel/checkpoint/folder.py",
        "        write_synced(partial, text)",
        "        write_synced(file, text)",
        "tests/mm/checkpoint/test_room.py",
    ),
    Fault(
        "checkpoint.inside",
        "an average is written into a checkpoint",
        "mm/checkpoint/alone.py",
        "    if inside is not None:",
        "    if False:",
        "tests/mm/checkpoint/test_average.py::test_what_cannot_be_averaged_is_refused",
    ),
    Fault(
        "checkpoint.masks",
        "an infinite weight is taken for a mask",
        "mm/checkpoint/verified.py",
        "return {*names} - state - trained if state else set()",
        "return {*names} - state",
        "tests/mm/checkpoint/test_verified.py",
    ),
    Fault(
        "checkpoint.evaluated",
        "a checkpoint is saved before the evaluation that it may be kept for",
        "mm/train/loop.py",
        'by_evaluation = cfg.checkpoint.keep_best == "eval_loss"',
        "by_evaluation = False",
        f"{LISTED}::test_a_run_keeps_the_best_by_its_evaluations",
    ),
    Fault(
        "checkpoint.waits",
        "nobody says that a run which is to end waits for its copies",
        "mm/train/loop.py",
        "            self._say_how_long()\n",
        "",
        "tests/mm/checkpoint/test_checkpoint.py::test_a_request_to_one_rank_ends_the_run_well_whenever_it_comes",
    ),
    Fault(
        "checkpoint.tokenizer",
        "a run is without its tokenizer while another one takes its place",
        "mm/data/tokenizer_files.py",
        "        _exchange(folder, at)\n",
        "        shutil.rmtree(at)\n",
        "tests/mm/data/test_tokenizer.py::test_the_tokenizer_of_a_run_is_there_at_any_moment",
    ),
    Fault(
        "checkpoint.sums",
        "another picture of a sample does not change its sum",
        "mm/data/columns/samples.py",
        "np.add.at(keys, of, part)",
        "np.add.at(keys, of[nth == 0], part[nth == 0])",
        SUMS,
    ),
    Fault(
        "checkpoint.sums_order",
        "payloads of a sample that change places leave its sum as it is",
        "mm/data/columns/samples.py",
        "part = (part * (2 * nth.astype(np.uint32) + 1))",
        "part = part",
        SUMS,
    ),
    Fault(
        "checkpoint.sums_kept",
        "sums of other samples stay beside the checkpoints",
        "mm/checkpoint/sums.py",
        'np.array_equal(there.columns["shards"], wanted)',
        'len(there.columns["shards"]) == len(wanted)',
        SUMS,
    ),
)
