"""Faults of copies of checkpoints in a store."""

from __future__ import annotations

from tests.mutations.fault import Fault

COPIES_TEST = "tests/mm/checkpoint/remote/test_copies.py"
START = "tests/mm/checkpoint/remote/test_start.py"
COPIER = "tests/mm/checkpoint/remote/test_copier.py"

COPIES = (
    Fault(
        "copies.unfinished",
        "what a copy that was interrupted has left in the target stays there",
        "mm/checkpoint/remote/copies.py",
        "unfinished=(*index.unfinished, home)",
        "unfinished=index.unfinished",
        f"{COPIES_TEST}::test_a_process_that_ends_at_any_write_leaves_whole_checkpoints",
    ),
    Fault(
        "copies.damaged",
        "a checkpoint that is damaged on the disk is published in the target",
        "mm/checkpoint/remote/copies.py",
        "if tuple(read) != tuple(listed[name]):",
        "if read.bytes != listed[name].bytes:",
        f"{COPIES_TEST}::test_a_checkpoint_that_is_damaged_here_is_not_published_there",
    ),
    Fault(
        "copies.stays",
        "a save removes the checkpoint that is being copied",
        "mm/checkpoint/remote/note.py",
        "if note is not None and p.name == note.copying)",
        "if note is None and p.name)",
        f"{COPIES_TEST}::test_what_is_being_copied_stays_in_the_runs_folder",
    ),
    Fault(
        "copies.back",
        "a run that has gone back keeps what came after in the target",
        "mm/checkpoint/remote/copies.py",
        "n for n, e in index.checkpoints.items() if step_of(n) > self.first and e.session != self.session",
        "n for n, e in index.checkpoints.items() if step_of(n) > self.first and not e.session",
        f"{COPIES_TEST}::test_a_run_that_goes_back_gives_up_what_came_after",
    ),
    Fault(
        "copies.other",
        "checkpoints are copied to a target that is another run's",
        "mm/checkpoint/remote/copies.py",
        "if found.run != self.run:",
        "if False:",
        f"{COPIES_TEST}::test_a_target_of_another_run_is_not_written_to",
    ),
    Fault(
        "copies.sum",
        "a file of a target is used whatever its sum",
        "mm/checkpoint/remote/fetch.py",
        'return "" if found == listed[file] else',
        'return "" if found.bytes == listed[file].bytes else',
        f"{START}::test_what_is_damaged_there_is_named_and_an_older_one_is_taken",
    ),
    Fault(
        "copies.manifest",
        "a manifest of a target is believed without its sum",
        "mm/checkpoint/remote/fetch.py",
        "if hashlib.sha256(data).hexdigest() != entry.manifest:",
        "if not data:",
        f"{START}::test_what_is_damaged_there_is_named_and_an_older_one_is_taken",
    ),
    Fault(
        "copies.unknown",
        "a run begins anew where its target does not answer",
        "mm/checkpoint/remote/start.py",
        "    except (OSError, DataError, CheckpointError) as error:\n        if path is None:",
        "    except (OSError, DataError, CheckpointError) as error:\n        if False:",
        f"{START}::test_a_store_that_cannot_be_asked_is_no_reason_to_begin_anew",
    ),
    Fault(
        "copies.killed",
        "no other process copies once one was killed",
        "mm/checkpoint/remote/copier.py",
        "self._pipe, self._seen = None, self._asked",
        "self._pipe, self._seen, self._over = None, self._asked, True",
        f"{COPIER}::test_a_killed_process_is_said_once_and_another_goes_on",
    ),
)
