"""Make what a run in two stages begins from: `python -m examples.two_stages [FOLDER]`.

It writes, in FOLDER (build/two-stages), a language model (Llama), a picture encoder (SigLIP) and a tokenizer
in the format in which they are published, small and with random weights, and shards of pictures of digits
with a sentence about each. Published folders take their place by name alone. Then:

    python -m mm train examples/two_stages.yaml
    python -m mm generate build/two-stages/run/all --image build/two-stages/digit.png
    python -m mm checkpoint export build/two-stages/run/all/step-00000400 build/two-stages/exported
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from encoders import compat

DIGITS = Path(__file__).resolve().parents[1] / "configs" / "data"
SPECIAL = ("<s>", "</s>", "<image>")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = 512


def main(folder: Path) -> None:
    """Write all of it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(pictures("train"))
    write_tokenizer(folder / "llm", [sentence(digit) for _, digit in pairs])
    write_models(folder)
    write_shard(folder / "digits-train-000000.tar", pairs)
    held_out = list(pictures("eval"))
    write_shard(folder / "digits-eval-000000.tar", held_out)
    (folder / "digit.png").write_bytes(held_out[0][0])
    print(f"{folder}: {len(pairs)} pictures; digit.png shows a {held_out[0][1]}")


def sentence(digit: int) -> str:
    """What is said of a picture."""
    return f"This picture shows the digit {NAMES[digit]}."


def pictures(split: str) -> Iterator[tuple[bytes, int]]:
    """(PNG, digit) of the default job's samples: each picture of which the text gives the digit."""
    for path in sorted(DIGITS.glob(f"digits-{split}-*.tar")):
        with tarfile.open(path) as tar:
            held = {m.name: m for m in tar.getmembers()}
            for name in held:
                if not name.endswith(".json"):
                    continue
                file = tar.extractfile(held[name])
                assert file is not None
                segments = json.load(file)["segments"]
                images = [s["vision"] for s in segments if "vision" in s]
                digits = [s["text"] for s in segments if s.get("depends") == "vision"]
                for part, digit in zip(images, digits, strict=False):
                    if digit.isdigit() and len(digit) == 1:
                        picture = tar.extractfile(held[f"{name.removesuffix('json')}{part}"])
                        assert picture is not None
                        yield picture.read(), int(digit)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE, as tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end, image = SPECIAL
    # Texts begin with <s>, as samples do in training and as Llama's own tokenizer has it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, SPECIAL.index(begin))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "image_token": image}, indent=2))


def write_models(folder: Path) -> None:
    """The language model and the picture encoder, with random weights."""
    compat.repair()  # transformers imports torchvision, which not every torch can
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

    llm = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    vision = SiglipVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vision_use_head=False,
    )
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    size, half = {"height": 32, "width": 32}, [0.5] * 3
    steps = {"do_resize": True, "size": size, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255}
    steps |= {"do_normalize": True, "image_mean": half, "image_std": half, "do_convert_rgb": True}
    kind = {"image_processor_type": "SiglipImageProcessor"}
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps({**kind, **steps}, indent=2))


def write_shard(path: Path, pairs: list[tuple[bytes, int]]) -> None:
    """Samples of a picture and a sentence."""
    with tarfile.open(path, "w") as tar:
        for k, (picture, digit) in enumerate(pairs):
            said = {"text": sentence(digit), "depends": "vision"}
            text = json.dumps({"segments": [{"vision": "img.png"}, said]}).encode()
            for name, data in ((f"{k:05d}.img.png", picture), (f"{k:05d}.json", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]) if len(sys.argv) > 1 else Path("build/two-stages"))
