"""What a job computes, sends and holds, counted from its plan: no tensor is made, nothing runs.

Entry points: job.count_job, rank.count_rank, layers.layer_counts, stage.llm_stage, stage.encoder_stage,
even.even_tokens, even.even_items. The last five need no blueprint; equal layers are counted once.
Layers are written here once more as they are in llm and encoders, on numbers in place of tensors (tape.Tape).
"""
