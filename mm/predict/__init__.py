"""What a step of a job costs on given hardware: counts of work, without running anything.

Entry points: work.Counts. mm/plan says what is computed where; this room how long it takes and what it holds.
count/ makes the counts: of a job from its blueprint, and of parts for many layouts without one.
"""
