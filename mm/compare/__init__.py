"""Several layouts of one job measured side by side, and what that shows in plain sentences.

Entry points: variants.variants, rounds.compare, result.Comparison, verdict.judge. result.py is what is
measured, as plain data for JSON and for reports. summary.py makes it of the timed steps, observe.py of steps
that are watched; chain.py finds what a step waited for, bound.py and verdict.py say it.
"""
