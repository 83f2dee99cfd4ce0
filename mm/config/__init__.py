"""The config: strict YAML, what of it can be checked without torch, and advice where it is refused.

Entry points: schema.load_config, outline.check_outline. Data is not opened and nothing is built here.
"""
