"""Faults in what feeds a job."""

from __future__ import annotations

from tests.mutations.fault import Fault

FEEDING = (
    Fault(
        "workers.order",
        "results are given to tasks by their order in the shards",
        "mm/ranks/workers.py",
        'for n, answer in zip(piece.which, said["answers"], strict=False):',
        'for n, answer in zip(sorted(piece.which), said["answers"], strict=False):',
        "tests/mm/ranks/test_workers.py::test_any_number_of_workers_gives_the_same",
    ),
    Fault(
        "workers.trays",
        "what a worker gives is not copied out of its tray, which is used again",
        "mm/ranks/decoding.py",
        "if place is not None and fits else found.clone()",
        "if place is not None and fits else found",
        "tests/mm/ranks/test_workers.py::test_any_number_of_workers_gives_the_same",
    ),
    Fault(
        "shared.ends",
        "memory of a batch that is there is given to the next one",
        "mm/ranks/shared.py",
        "weakref.finalize(own, self._back.append,",
        "weakref.finalize(own.copy(), self._back.append,",
        "tests/mm/ranks/test_shared.py::test_tensors_that_are_there_share_nothing",
    ),
    Fault(
        "batch.joined",
        "items of one memory are packed as if they lay one after another",
        "encoders/contract.py",
        "if not (same and tensor.storage_offset() == at and tensor.is_contiguous()):",
        "if not (same and tensor.is_contiguous()):",
        "tests/encoders/test_encoders.py::test_items_that_lie_together_are_packed_as_others_are",
    ),
    Fault(
        "workers.blame",
        "a worker's end is counted against the first task of its order",
        "mm/ranks/workers.py",
        "self._charge(lost[0], n, ended + why)",
        "self._charge(lost[0], 0, ended + why)",
        "tests/mm/ranks/test_workers.py::test_workers_that_die_are_named_and_replaced",
    ),
    Fault(
        "skipped.window",
        "a bad sample among the first few is a large share",
        "mm/ranks/skipped.py",
        "if sum(last) > self._share * WINDOW:",
        "if sum(last) > self._share * len(last):",
        "tests/mm/ranks/test_skipped.py::test_the_size_of_a_batch_does_not_change_when_a_run_ends",
    ),
    Fault(
        "columns.views",
        "samples that are made together have the names of the first one's table",
        "mm/data/columns/samples.py",
        "pairs = [self.pairs[k] for k in self._pair_of[shard].tolist()]",
        "pairs = [self.pairs[0 * k] for k in self._pair_of[shard].tolist()]",
        "tests/mm/data/test_columns.py::test_samples_are_what_a_scan_has_found_however_shards_are_split_over_files",
    ),
    Fault(
        "workers.in-place",
        "what was not decoded to its place is not written there",
        "mm/ranks/decoding.py",
        "if self.memory.place(found) != place:",
        "if self.memory.place(found) not in (None, place):",
        "tests/mm/ranks/test_workers.py::test_any_number_of_workers_gives_the_same",
    ),
    Fault(
        "encoders.place",
        "patches are written to a place for another number of them",
        "encoders/vit.py",
        "if out.dtype != torch.float32 or len(out) != cls.input_count(cfg, meta):",
        "if out.dtype != torch.float32:",
        "tests/encoders/test_places.py",
    ),
    Fault(
        "planner.bad",
        "the process that plans is told of bad samples once",
        "mm/ranks/planner.py",
        "bad = bad if now_bad is None else now_bad",
        "bad = bad or now_bad",
        "tests/mm/ranks/test_planner.py::test_the_process_knows_which_samples_are_bad",
    ),
    Fault(
        "forks.collect",
        "a process that is forked collects what its rank had, process groups without their threads among it",
        "mm/forks.py",
        "gc.disable()  # Python",
        "pass  # Python",
        "tests/mm/test_forks.py",
    ),
    Fault(
        "reads.stages",
        "later stages of an encoder read pictures that they do not use",
        "mm/ranks/batch.py",
        "needed = self._needed(use, edge) if at.pp == 0 else range(0)",
        "needed = self._needed(use, edge)",
        "tests/mm/ranks/test_reads.py",
    ),
)
