"""plan.json: what other people's tools read of a job."""

from __future__ import annotations

import json

from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.plan.blueprint import draw_up
from mm.report.plan_json import plan_json
from tests.mm.harness import CONFIGS, small


def test_the_keys_of_a_plan_in_their_order() -> None:
    raw = small(layout={"vision": {"ranks": 1}, "llm": {"pp": 2}})
    index = load_index(raw["data"]["train"], CONFIGS, write=False)
    plan = json.loads(plan_json(draw_up(from_mapping(raw, CONFIGS), 2), index))
    assert ",".join(plan) == (
        "layouts,edges,tokens,flops_by_module,weight_bytes_per_rank,stages,schedule,encoders,data_parallel"
    )
    assert ",".join(plan["layouts"]["llm"]) == "ranks,tp,cp,dp,pp,vpp,ep,edp,etp,sequence_parallel"
    assert plan["layouts"]["vision"]["ranks"] == [1] and plan["layouts"]["llm"]["pp"] == 2
    assert list(plan["edges"]) == ["vision", "audio"] == list(plan["encoders"])
    assert ",".join(plan["edges"]["vision"]) == "rows,forward_bytes,backward_bytes"
    assert plan["stages"]["llm"] == [[0, plan["stages"]["llm"][0][1]], [plan["stages"]["llm"][0][1], 4]]
    assert ",".join(plan["schedule"]) == "kind,programs"
    assert [",".join(program) for program in plan["schedule"]["programs"]] == ["ranks,actions"] * 2
    assert all(isinstance(a, str) for a in plan["schedule"]["programs"][0]["actions"])
    assert [",".join(found) for found in plan["data_parallel"].values()] == ["policy,costs"] * 3
    assert ",".join(plan["data_parallel"]["llm"]["costs"]["zero1"]) == "rest,step,peak,moved"
    assert plan["encoders"] == {"audio": "FastConformer", "vision": "ViT"}
