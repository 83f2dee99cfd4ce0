"""Faults in what a job does about faults."""

from __future__ import annotations

from tests.mutations.fault import Fault

_BLAME = "tests/faults/test_blame.py"
_RECORD = "tests/faults/test_record.py"
_HEART = "tests/faults/test_heartbeat.py"

FAULTY = (
    Fault(
        "blame.silent",
        "a short pause is blamed for a long wait",
        "mm/faults/blame.py",
        "r.silent_s >= max(SILENT_S, waited / 2)",
        "r.silent_s >= SILENT_S",
        f"{_BLAME}::test_a_pause_that_is_shorter_than_half_of_the_wait_is_no_reason",
    ),
    Fault(
        "blame.working",
        "a rank that only waits is blamed",
        "mm/faults/blame.py",
        "working = [r for r in left if not r.post.waits]",
        "working = left",
        f"{_BLAME}::test_who_only_waits_is_innocent",
    ),
    Fault(
        "blame.done",
        "a rank that has left is blamed",
        "mm/faults/blame.py",
        "left = [r for r in ranks if not r.post.done]",
        "left = list(ranks)",
        f"{_BLAME}::test_who_has_left_is_innocent",
    ),
    Fault(
        "blame.before",
        "the time at work before a rank fell silent does not count",
        "mm/faults/blame.py",
        "return rank.silent_s + (0.0 if rank.post.waits else rank.post.still_s)",
        "return rank.silent_s",
        f"{_BLAME}::test_a_rank_at_its_own_work_is_to_blame",
    ),
    Fault(
        "failure.first",
        "the last failure is the job's, not the first",
        "mm/faults/failure.py",
        "return read(store.compare_set(KEY, NONE, json.dumps(asdict(failure)))) or failure",
        "return store.set(KEY, json.dumps(asdict(failure))) or failure",
        f"{_RECORD}::test_the_first_failure_is_the_jobs",
    ),
    Fault(
        "sites.ours",
        "a plug-in that waits for itself passes for a wait for other ranks",
        "mm/faults/sites.py",
        'return (ours or "torch/distributed/" in file) and',
        "return",
        f"{_RECORD}::test_a_thread_at_a_message_waits_and_one_in_a_plug_in_works",
    ),
    Fault(
        "record.pair",
        "the second action of a pair ends what is around it",
        "mm/faults/record.py",
        "if self._open and not isinstance(self._open[-1].what, str):",
        "if self._open:",
        f"{_RECORD}::test_the_last_entry_without_an_end_is_what_a_rank_does",
    ),
    Fault(
        "watch.machine",
        "ranks of two machines whose hosts have one name are taken for ranks of one",
        "mm/faults/heartbeat.py",
        "about = About(this_machine(), os.getpid(),",
        "about = About(socket.gethostname(), os.getpid(),",
        f"{_HEART}::test_a_rank_goes_on_with_its_agent_or_without_any",
    ),
    Fault(
        "watch.elsewhere",
        "a machine that is cut off is not named",
        "mm/faults/watch.py",
        'return Seen(rank, post, silent, ended, state == "T", elsewhere)',
        'return Seen(rank, post, silent, ended, state == "T")',
        f"{_HEART}::test_a_rank_of_another_machine_is_not_looked_up_here",
    ),
    Fault(
        "heartbeat.agent",
        "a rank goes on although the agent that started it has ended",
        "mm/faults/heartbeat.py",
        "if agent and self._parting is None and os.getppid() != agent:",
        "if False:",
        f"{_HEART}::test_a_rank_whose_agent_has_ended_does_not_go_on",
    ),
    Fault(
        "rendezvous.cut",
        "ranks that have met wait without a bound for a store that is cut off",
        "mm/ranks/rendezvous.py",
        "return _bounded(partial(_all_here, store, rank, world, timeout_s),",
        "return (lambda act, *bounds: act())(partial(_all_here, store, rank, world, timeout_s),",
        "tests/mm/ranks/test_rendezvous.py::test_a_store_that_no_longer_answers_is_named_in_time",
    ),
    Fault(
        "rendezvous.counts",
        "ranks whose agents count restarts differently do not meet",
        "mm/ranks/rendezvous.py",
        'if agent_serves() else "0"',
        'if True else "0"',
        "tests/mm/ranks/test_rendezvous.py::test_only_a_store_that_outlives_ranks_has_a_part_for_each_start",
    ),
    Fault(
        "writer.early",
        "a writer that ends before its first checkpoint is a traceback",
        "mm/checkpoint/writer.py",
        "with contextlib.suppress(OSError):  # it has ended",
        "with contextlib.suppress(KeyError):  # it has ended",
        "tests/faults/test_writer.py::test_a_writer_that_ends_before_its_first_checkpoint_is_told",
    ),
    Fault(
        "stragglers.median",
        "the slowest rank is named with the module that is largest everywhere",
        "mm/train/stragglers.py",
        "float(s[rank] - np.median(s[s > 0]))",
        "float(s[rank])",
        "tests/mm/train/test_stragglers.py",
    ),
    Fault(
        "faults.samples",
        "an error of a computation without samples ends with an empty list of them",
        "mm/train/forward.py",
        "    if names:\n        error.add_note(",
        "    if True:\n        error.add_note(",
        "tests/faults/test_record.py::test_an_error_tells_its_first_samples_and_none_where_there_are_none",
    ),
    Fault(
        "faults.code",
        "a rank that a plug-in ends with 3 makes the job one with bad data",
        "mm/ranks/launch.py",
        "if failed is not None and any(codes.values()):",
        "if False:",
        "tests/mm/ranks/test_launch.py::test_the_code_of_a_job_is_that_of_what_was_told",
    ),
)
