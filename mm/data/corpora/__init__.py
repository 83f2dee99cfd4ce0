"""Corpora that anyone can install, made into shards on the user's side: pictures, human voices, their texts.

Entry points: recipes.RECIPES, recipes.prepare. A recipe reads an installed package or a folder, is
deterministic, holds out whole pictures with all that is said of them, and writes licences beside its shards.
"""
