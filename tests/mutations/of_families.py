"""Faults of the language models with latents, stacked experts and quantised weights."""

from __future__ import annotations

from tests.mutations.fault import Fault

FAMILIES = (
    Fault(
        "hf.mixed",
        "features of gate and up follow each other, though the file has them in turns",
        "parallel/published/tables.py",
        "step=len(names)) if row.mixed",
        "step=1) if row.mixed",
        "tests/llm/test_families.py::test_any_model_of_a_family_is_that_of_transformers[gpt_oss-0]",
    ),
    Fault(
        "hf.nibbles",
        "the higher four bits of a byte come first",
        "parallel/published/quantised.py",
        "[codes & 15, codes >> 4]",
        "[codes >> 4, codes & 15]",
        "tests/llm/test_quantised.py::test_mxfp4_is_read_as_transformers_reads_it_and_written_as_bfloat16",
    ),
    Fault(
        "hf.factors",
        "a block of an FP8 matrix begins with a factor of its own",
        "parallel/published/quantised.py",
        "// n - s.start // n",
        "// n * 0 + (torch.arange(s.stop - s.start) // n)",
        "tests/llm/test_quantised.py::test_any_block_is_that_of_the_whole",
    ),
    Fault(
        "mla.gradient",
        "latents of tokens are summed over tp, as if all ranks had made the same",
        "llm/mla.py",
        "own = ParamSpec(normal(cfg.init_std), partial=axes.sequence_parallel)",
        "own = ParamSpec(normal(cfg.init_std))",
        "tests/llm/test_latents.py::test_tp_and_cp",
    ),
    Fault(
        "mla.before",
        "keys that a rank makes of rows of others get no gradient",
        "parallel/context_parallel/attention.py",
        "d_keys[len(q) :] += d_block",
        "d_keys[len(q) :] += 0.0 * d_block",
        "tests/llm/test_latents.py::test_tp_and_cp",
    ),
    Fault(
        "mla.wide",
        "keys and values of all heads travel under cp, not latents",
        "parallel/context_parallel/attention.py",
        """    if method == "gather":
        before =""",
        """    if method is None:
        before =""",
        "tests/llm/test_latents.py::test_rows_of_latents_travel_under_cp",
    ),
    Fault(
        "mla.scale",
        "scores of next tokens are scaled by the width of the latent",
        "llm/mla.py",
        "packing.position, scale=self.scale, limits",
        "packing.position, limits",
        "tests/llm/test_decode.py::test_a_token_at_a_time_is_the_whole_document_at_once[latents]",
    ),
    Fault(
        "mla.pairs",
        "positions turn halves where the model was trained with neighbours",
        "llm/attention.py",
        "if self.interleaved else",
        "if not self.width else",
        "tests/llm/test_switches.py::test_each_switch_is_the_straight_line_program[latents]",
    ),
    Fault(
        "hf.mscale",
        "yarn's factor on scores is not squared",
        "llm/hf/latents.py",
        "_mscale(scaling, every) ** 2",
        "_mscale(scaling, every)",
        "tests/llm/test_family_configs.py::test_older_spellings_are_those_of_transformers[DeepSeek-V3]",
    ),
    Fault(
        "hf.rounded",
        "the factor on embeddings is exact where published models round it",
        "llm/model.py",
        "x * x.new_full((), self.cfg.embed_scale)",
        "x * self.cfg.embed_scale",
        "tests/llm/test_family_files.py::test_a_factor_on_embeddings_is_rounded_to_their_dtype",
    ),
)
