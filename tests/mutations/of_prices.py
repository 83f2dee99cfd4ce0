"""Faults in prices and in predicted steps."""

from __future__ import annotations

from tests.mutations.fault import Fault

LINKS = "tests/mm/predict/test_links.py::test"
STEP = "tests/mm/predict/test_step.py::test"

PRICES = (
    Fault(
        "price.nics",
        "devices of a node that send at once each have all of its NICs",
        "mm/predict/links.py",
        "min(1.0, nics / max(1, place.sharing))",
        "1.0",
        f"{LINKS}_devices_that_send_at_once_share_their_nodes_nics",
    ),
    Fault(
        "hardware.numbers",
        "a bandwidth that is no number is taken for one",
        "mm/predict/hardware.py",
        "if not 0 < value < math.inf:",
        "if value <= 0:",
        "tests/mm/predict/test_hardware.py::test_a_wrong_file_is_refused_in_words",
    ),
    Fault(
        "price.twice",
        "a sum of tensors costs as much as a gather of them",
        "mm/predict/links.py",
        "return message.bytes * (ranks - 1) / ranks * (2 if",
        "return message.bytes * (ranks - 1) / ranks * (1 if",
        f"{LINKS}_long_messages_take_their_bytes_over_the_bandwidth",
    ),
    Fault(
        "price.exchanges",
        "exchanges of experts are in a computation's seconds and beside them",
        "mm/predict/costs.py",
        "key: p.seconds - sum(p.exchanges) for",
        "key: p.seconds for",
        f"{STEP}_experts_exchanges_are_counted_once",
    ),
    Fault(
        "price.ragged",
        "launches grow with the load of a micro-batch",
        "mm/predict/costs.py",
        "fixed[m] + (1 - fixed[m]) * x if x else 0.0",
        "x",
        f"{STEP}_launches_do_not_grow_with_the_load",
    ),
    Fault(
        "price.share",
        "idle data ranks keep a core busy while the busiest one computes",
        "parallel/schedule/simulator/simulate.py",
        "len(plan.ranks_of[p]) * costs.share.get(a.module, 1.0)",
        "len(plan.ranks_of[p])",
        "tests/parallel/schedule/simulator/test_simulate.py::test_ranks_that_idle_leave_their_cores_to_others",
    ),
    Fault(
        "price.memory",
        "memory is that of a rank that holds little",
        "mm/predict/held.py",
        "return ranks[int(np.argmax(score[list(ranks)]))]",
        "return ranks[int(np.argmin(score[list(ranks)]))]",
        f"{STEP}_memory_is_that_of_the_rank_with_the_data",
    ),
)
