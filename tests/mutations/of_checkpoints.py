"""Faults of checkpoints: how they are written beside training, which stay, what is trusted."""

from __future__ import annotations

from tests.mutations.fault import Fault

SAVER = "tests/mm/checkpoint/test_saver.py"
LISTED = "tests/mm/checkpoint/test_listed.py"
HOSTILE = "tests/mm/checkpoint/test_hostile.py"

CHECKPOINTS = (
    Fault(
        "checkpoint.gone",
        "a checkpoint that a run removes while others are listed is called damaged",
        "mm/checkpoint/listed.py",
        "if not path.is_dir():",
        "if False:",
        "tests/mm/checkpoint/test_listed.py::test_what_a_run_removes_meanwhile_is_not_damaged",
    ),
    Fault(
        "checkpoint.watched",
        "numbers that were watched are anything that a state.json says",
        "mm/checkpoint/state.py",
        "whole = all(type(n) is int for n in [*counts, *left_out])",
        "whole = True",
        "tests/mm/checkpoint/test_hostile.py::test_numbers_that_were_watched_are_numbers",
    ),
    Fault(
        "checkpoint.moved",
        "a run whose folder was renamed begins another one, with checkpoints alone",
        "parallel/checkpoint/share.py",
        "partial.mkdir(exist_ok=True)",
        "partial.mkdir(parents=True, exist_ok=True)",
        f"{SAVER}::test_a_folder_that_was_moved_away_is_told_and_not_begun_anew",
    ),
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
)
