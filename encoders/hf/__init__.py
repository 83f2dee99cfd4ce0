"""Encoders with published weights: which families are known, their folders, reading them whole or sharded.

To add a family: register its encoder, describe it as a Family (family.py), add it to FAMILIES in folder.py.
Language models may not enter.
"""

from encoders.hf.folder import Opened, open_folder
from encoders.hf.load import Published, fill, load_hf

__all__ = ["Opened", "Published", "fill", "load_hf", "open_folder"]
