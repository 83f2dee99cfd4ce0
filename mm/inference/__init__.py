"""Trained models in use, in one process or over ranks: prompts of text and items, answers, exact match.

Entry points: whole.load_whole, spread.load_spread, source.source_of, prompt.read_prompt, answer.answer,
exact.ask. Training may not enter.
"""
