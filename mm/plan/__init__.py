"""What every rank derives alike without messages: the checked config, the samples that fit, each step's plan.

Entry points: blueprint.draw_up, batches.Batches, step_plan.plan_step. Everything is pure. No process group
may enter.
"""
