"""The loop: a step forward and backward, its update, evaluation, and what is shown and written of it.

Entry points: trainer.train, step.run_step, evaluate.evaluate. Layouts are not told apart here.
"""
