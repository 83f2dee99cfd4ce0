"""Hugging Face checkpoints of the Nemotron-H family: reading, also sharded, and writing.

Other families and other modules of the job may not enter.
"""

from llm.hf.causal import CausalLM, load_hf
from llm.hf.config import read_config, write_config
from llm.hf.export import export_checkpoint, save_hf
from llm.hf.weights import load_weights

__all__ = [
    "CausalLM",
    "export_checkpoint",
    "load_hf",
    "load_weights",
    "read_config",
    "save_hf",
    "write_config",
]
