"""The training loop: a step forward and backward, its update, evaluation, and what a run prints and writes.

Entry points: trainer.train, step.run_step, evaluate.evaluate. No code here may depend on a particular layout.
"""
