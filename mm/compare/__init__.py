"""Several layouts of one job measured side by side.

Entry points: variants.variants, rounds.compare, result.Comparison. result.py is what is measured, as plain
data for JSON and for reports; summary.py makes it of what the rounds gave.
"""
