"""What a step of a job takes and holds on given hardware, without running anything.

Entry points: work.Counts, step.predict, hardware.load_hardware.
count/ counts what ranks compute, send and hold: count.job.count_job(blueprint, plan). For many layouts,
without a blueprint: count.stage.llm_stage() and encoder_stage(), remembered by all that determines them, and
loads of count.even. mm/plan says what is computed where.
"""
