"""Reports on a job: the header of a run, plan.json, drawings of a step.

Entry points: header.header, plan_json.plan_json, timeline.draw_simulated. Reports change nothing.
"""
