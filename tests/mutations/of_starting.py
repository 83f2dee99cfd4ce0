"""Faults in how a run starts, and starts again."""

from __future__ import annotations

from tests.mutations.fault import Fault

STARTING = (
    Fault(
        "claim.removed",
        "a claim that its holder has just given up is taken for one's own",
        "mm/ranks/claim.py",
        "if not _is_at(path, fd):  # its holder has removed it meanwhile",
        "if False:  # its holder has removed it meanwhile",
        "tests/mm/ranks/test_claim.py::test_a_claim_that_is_given_up_while_another_waits_for_it_is_not_taken",
    ),
    Fault(
        "claim.settled",
        "without locks, every writer of a claim is its holder",
        "mm/ranks/claim.py",
        "if now != here or not _is_at(path, fd):",
        "if not _is_at(path, fd):",
        "tests/mm/ranks/test_claim.py::test_without_locks_the_last_of_two_writers_has_it",
    ),
    Fault(
        "claim.touched",
        "a run on another machine is dead, whatever it does",
        "mm/ranks/claim.py",
        "if now != seen:",
        "if now is None:",
        "tests/mm/ranks/test_claim.py::test_a_run_on_another_machine_is_told_by_its_touches",
    ),
    Fault(
        "claim.kept",
        "a folder is free while the ranks of a killed launcher write to it",
        "mm/ranks/launch.py",
        'pass_fds=[int(fd) for fd in env.get(CLAIMS, "").split()],',
        "pass_fds=[],",
        "tests/mm/ranks/test_claim.py::test_ranks_keep_the_claim_of_a_launcher_that_is_killed",
    ),
    Fault(
        "rendezvous.mute",
        "a port that says nothing is waited for without a bound",
        "mm/ranks/rendezvous.py",
        "return _bounded(reach, timeout_s + SPARE_S)",
        "return _bounded(reach, 30.0)",
        "tests/mm/ranks/test_rendezvous.py::test_a_port_of_a_program_that_says_nothing_is_named_in_time",
    ),
    Fault(
        "output.gone",
        "a terminal that is closed ends the run",
        "mm/ranks/output.py",
        "            self._gone = True\n            return len(data)",
        "            raise",
        "tests/mm/ranks/test_output.py",
    ),
    Fault(
        "course.said",
        "another learning rate passes without a word",
        "mm/checkpoint/course.py",
        '*("train.statistics", "train.recompute", "train.offload", "train.shard"),',
        '"train",',
        "tests/mm/checkpoint/test_course.py::test_what_changes_the_course_is_said",
    ),
    Fault(
        "course.log",
        "what is different is not in the log of the run that resumes",
        "mm/train/trainer.py",
        'at step {state.step}", *state.changed]',
        'at step {state.step}"]',
        "tests/mm/checkpoint/test_course.py::test_a_run_says_what_is_different_from_here_on",
    ),
    Fault(
        "drawn.items",
        "pictures may change under the same texts",
        "mm/plan/drawn.py",
        "elif differ := _in_shards(old, new, name):",
        "elif was != now and (differ := _in_shards(old, new, name)):",
        "tests/mm/plan/test_drawn.py::test_a_shard_that_changed_is_named_and_what_of_it",
    ),
    Fault(
        "agree.recipe",
        "ranks start with different configs",
        "mm/ranks/rendezvous.py",
        "json.dumps(first if len(first) > 1 else [])",
        "json.dumps([])",
        "tests/mm/ranks/test_agree.py::test_every_rank_is_told_which_key_differs_where",
    ),
    Fault(
        "agree.data",
        "ranks read other shards under the same names",
        "mm/train/trainer.py",
        "    check_same_data(rank, blueprint, indexes)\n",
        "",
        "tests/mm/ranks/test_agree.py::test_jobs_of_ranks_that_disagree",
    ),
    Fault(
        "agree.code",
        "a changed source is the same code",
        "mm/ranks/versions.py",
        '{len(data)}\\n".encode() + data)',
        '{len(data)}\\n".encode())',
        "tests/mm/ranks/test_agree.py::test_sources_are_told_apart_by_content_and_name",
    ),
)
