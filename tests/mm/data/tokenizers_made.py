"""Tokenizers of several kinds, trained here on a few lines: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers as tk
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "  Two blanks before; a tab\tin between.\nA new line, numbers 1234 and 5,678.90!",
    "Ünïcödé, naïve café, 東京 and emoji 🙂🚀; def f(x): return x ** 2",
    "<|im_start|>user and <|im_end|> are not written by people, mostly. What is seen? A boat.",
]
TEXTS = [
    *CORPUS,
    *("", " ", "a", " a", "a ", "\n\n", "the dog</s>the fox", "x<image>y", "<|im_end|> after", "é", "🙂"),
    *("THE QUICK   brown", "don't", "a\u00a0b", "e\u0301 combined", "<image> <image>", "\ttab", "ﬁ ligature"),
]
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>", "<audio>", "<unk>"]


def byte_bpe(prefix_space: bool = False) -> tk.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    made = tk.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def word_piece() -> tk.Tokenizer:
    """As BERT has it, with markers that its post-processor puts around a text."""
    made = tk.Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made


def unigram(scheme: str = "first") -> tk.Tokenizer:
    """As Llama 2, T5 and Gemma have it: blanks are ▁, one of them before a text."""
    made = tk.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


KINDS: dict[str, Callable[[], tk.Tokenizer]] = {
    "byte-level BPE": byte_bpe,
    "byte-level BPE with a blank before": lambda: byte_bpe(True),
    "WordPiece": word_piece,
    "Unigram, first": unigram,
    "Unigram, always": lambda: unigram("always"),
}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNTAGGED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def write_tokenizer(folder: Path, made: tk.Tokenizer, *, template: str | None = None, **config: Any) -> Path:
    """A folder as published ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    # Stored settings that would act where they are not taken off.
    made.enable_truncation(4)
    made.enable_padding(length=9, pad_id=2, pad_token="<pad>")
    made.save(str(folder / "tokenizer.json"))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
