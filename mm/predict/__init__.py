"""What a step of a job costs on given hardware: counts of work, without running anything.

Entry points: work.Counts, count.job.count_job(blueprint, plan). For many layouts, without a blueprint:
count.stage.llm_stage() and encoder_stage(), remembered by all that determines them, and count.even's loads.
mm/plan says what is computed where; this room how long it takes and what it holds.
"""
