"""Published language models of Hugging Face's format: reading, also sharded, and writing, family by family.

Other modules of the job may not enter. families.py and mixtures.py describe them, each by parts of
config.json (parts.py, rope.py, windows.py, experts.py, hybrid.py, latents.py) and rows of tensors
(decoder.py); nemotron_h.py is one of its own.
"""

from llm.hf.causal import CausalLM, load_hf
from llm.hf.config import export_family, read_config, write_config
from llm.hf.export import export_checkpoint, save_hf
from llm.hf.registry import FAMILIES
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
