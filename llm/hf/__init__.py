"""Published language models of Hugging Face's format: reading, also sharded, and writing, family by family.

Other modules of the job may not enter. families.py lists what is known; nemotron_h.py is the hybrid family,
the others are decoders made of parts.py, rope.py and decoder.py.
"""

from llm.hf.causal import CausalLM, load_hf
from llm.hf.config import export_family, read_config, write_config
from llm.hf.export import export_checkpoint, save_hf
from llm.hf.families import FAMILIES
from llm.hf.weights import load_weights

__all__ = [
    "FAMILIES",
    "CausalLM",
    "export_checkpoint",
    "export_family",
    "load_hf",
    "load_weights",
    "read_config",
    "save_hf",
    "write_config",
]
