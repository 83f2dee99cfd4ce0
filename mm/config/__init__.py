"""The config: strict YAML, the checks that need no torch, and advice where a config is refused.

Entry points: schema.load_config, build.build, outline.check_outline. No data is opened and no module is built
here.
"""
