"""plan.json: what other people's tools read of a job."""

from __future__ import annotations

import json

from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.plan.blueprint import draw_up
from mm.report.groups import communicator_data, communicator_lines
from mm.report.plan_json import plan_json
from tests.mm.harness import CONFIGS, small


def test_the_keys_of_a_plan_in_their_order() -> None:
    raw = small(layout={"vision": {"ranks": 1}, "llm": {"pp": 2}})
    index = load_index(raw["data"]["train"], CONFIGS, write=False)
    plan = json.loads(plan_json(draw_up(from_mapping(raw, CONFIGS), 2), index))
    assert ",".join(plan) == (
        "layouts,edges,tokens,flops_by_module,weight_bytes_per_rank,stages,schedule,encoders,"
        "communicators,data_parallel"
    )
    assert ",".join(plan["layouts"]["llm"]) == "ranks,tp,cp,dp,pp,vpp,ep,edp,etp,sequence_parallel"
    assert plan["layouts"]["vision"]["ranks"] == [1] and plan["layouts"]["llm"]["pp"] == 2
    assert list(plan["edges"]) == ["vision", "audio"] == list(plan["encoders"])
    assert ",".join(plan["edges"]["vision"]) == "rows,forward_bytes,backward_bytes"
    assert plan["stages"]["llm"] == [[0, plan["stages"]["llm"][0][1]], [plan["stages"]["llm"][0][1], 4]]
    assert ",".join(plan["schedule"]) == "kind,programs"
    assert [",".join(program) for program in plan["schedule"]["programs"]] == ["ranks,actions"] * 2
    assert all(isinstance(a, str) for a in plan["schedule"]["programs"][0]["actions"])
    assert ",".join(plan["communicators"]) == "node_size,calls,a_rank,names"
    assert plan["communicators"]["names"]["llm.pp.forward"] == {"groups": 1, "ranks": 2, "across_nodes": 0}
    assert [",".join(found) for found in plan["data_parallel"].values()] == ["policy,costs"] * 3
    assert ",".join(plan["data_parallel"]["llm"]["costs"]["zero1"]) == "rest,step,peak,moved"
    assert plan["encoders"] == {"audio": "FastConformer", "vision": "ViT"}


def test_which_groups_cross_nodes_is_said() -> None:
    raw = small(layout={"vision": {"ranks": "0-1"}, "llm": {"tp": 2, "pp": 2}}, run={"node_size": 2})
    data = communicator_data(draw_up(from_mapping(raw, CONFIGS), 4))
    across = {name: g.across_nodes for name, g in data.names.items() if g.across_nodes}
    across.pop("llm.ends", None)  # only of tied weights
    assert across == {
        "world": 1, "audio.data": 1, "audio.stage": 1, "llm.pp.forward": 2, "llm.pp.backward": 2,
        "edge.audio.forward": 1, "edge.audio.backward": 1,
    }  # fmt: skip
    lines = communicator_lines(data)
    assert "nodes of 2 ranks, crossed by world (1 of 1), " in lines[1] and "llm.tp" not in lines[1]
