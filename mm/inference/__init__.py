"""Trained models in use, in one process: a whole model from any folder, prompts of text and items, answers.

Entry points: whole.load_whole, prompt.read_prompt, answer.answer. Training may not enter.
"""
