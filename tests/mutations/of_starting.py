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
)
