"""Faults of whole models' folders."""

from __future__ import annotations

from tests.mutations.fault import Fault

LLAVA = "tests/mm/containers/test_llava.py::test_logits_gradients_and_both_ways[clip-llama-1]"
OTHERS = "tests/mm/containers/test_others.py"

FOLDERS = (
    Fault(
        "folders.strategy",
        "an export keeps the row of a class token that the model has not seen",
        "mm/containers/llava.py",
        'return "default" if cfg.prefix and not cfg.prefix_rows else "full"',
        'return "full"',
        LLAVA,
    ),
    Fault(
        "folders.layer",
        "rows are those of the layer before the one that a folder names",
        "mm/containers/llava.py",
        "layers = cfg.layers + 1 + layer if layer < 0 else layer",
        "layers = max(1, cfg.layers + layer if layer < 0 else layer - 1)",
        LLAVA,
    ),
    Fault(
        "folders.pairs",
        "of each pair of states of sound the second is left out",
        "encoders/audio/flamingo.py",
        "self.norm(x.mean(1))",
        "self.norm(x[:, 0])",
        f"{OTHERS}::test_audio_flamingo[qwen2]",
    ),
    Fault(
        "folders.begin",
        "a prompt of a folder with a card begins otherwise than samples of its training",
        "mm/inference/whole.py",
        'begin = tuple(card.get("begin", tokenizer.begin))',
        "begin = tuple(tokenizer.begin)",
        f"{OTHERS}::test_a_folder_with_a_card_is_read_back_whole",
    ),
    Fault(
        "folders.own",
        "encoders of ours keep their drawn weights where a run starts from a folder with a card",
        "mm/checkpoint/whole.py",
        "if enc.weights is None:",
        "if enc.weights is None or is_own(enc.weights):",
        "tests/mm/inference/test_eval.py::test_a_folder_with_a_card_has_the_losses_and_answers_of_its_run",
    ),
)
