"""What a job computes, sends and holds, counted from its plan: no tensor is made, nothing runs.

Entry points: job.count_job, rank.count_rank, stage.stage_counts, layers.layer_counts.
Layers are written here once more as they are in llm and encoders, on numbers in place of tensors (tape.Tape).
"""
