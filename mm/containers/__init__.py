"""Whole models in one folder: which containers of transformers are known, read and written.

Entry points: registry.fitting, registry.container_of, registry.modules_of, write.files_of.

A container says how config.json nests its modules, which prefix each module's tensors have, which rows its
projectors are, and which token stands for an item. To add one: a file like llava.py, and its name in
registry.py. Training may not enter.
"""
