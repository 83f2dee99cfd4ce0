"""Carries out plans: calls handlers in order, splits a backward in two halves, stands in for real work.

Only handlers decide what an action does to tensors. Entry points: execute.execute, standin.run_standins.
The package imports nothing itself: stand-ins need torch, and refusals must come without it.
"""
