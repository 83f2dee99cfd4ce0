"""A film in a conversation: its times and markers stand as Qwen3-VL's processor writes them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mm
from mm.inference.prompt import read_prompt
from tests.encoders.test_video import video
from tests.mm.checkpoint.test_qwen_vl import saved
from tests.mm.data.tokenizers_made import byte_bpe, write_tokenizer

from transformers import AutoTokenizer  # isort: skip
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor  # isort: skip
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor  # isort: skip
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor  # isort: skip
from transformers.video_utils import VideoMetadata  # isort: skip

MARKERS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (  # writes items as Qwen3-VL's does
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}"
    "{{ '<|vision_start|><|' + p.type + '_pad|><|vision_end|>' }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def frames_of(payload: bytes) -> np.ndarray:
    """uint8 [frames, height, width, 3] of a tar of pictures."""
    with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
        files = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".png")}
        found = [Image.open(io.BytesIO(f.read())) for _, f in sorted(files.items()) if f is not None]
    return np.stack([np.array(x) for x in found])


@pytest.mark.slow
@pytest.mark.parametrize("frames", [4, 9])
def test_a_film_in_a_chat_is_written_as_its_processor_writes_it(frames: int, tmp_path: Path) -> None:
    saved("qwen3_vl", tmp_path, 1, torch.float64)
    core = byte_bpe()
    core.add_special_tokens(list(MARKERS))
    write_tokenizer(tmp_path, core, template=TEMPLATE)
    core.no_truncation()
    core.no_padding()
    core.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "config.json").read_text())
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config |= {name: core.token_to_id(token) for name, token in zip(names, MARKERS, strict=True)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    payload = video(frames, (24, 16), "3.0")
    content: list[dict[str, Any]] = [{"type": "text", "text": "see "}, {"type": "video", "video": "a.tar"}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": " now"}]}]
    prompt = read_prompt(mm.load(tmp_path), {"messages": messages}, {"a.tar": payload})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=TEMPLATE
    )
    info = VideoMetadata(total_num_frames=frames, fps=3.0, duration=frames / 3)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = processor(text=text, videos=[frames_of(payload)], video_metadata=[info])["input_ids"][0]
    image, film = (config[f"{kind}_token_id"] for kind in ("image", "video"))
    assert prompt.ids.tolist() == theirs and image not in theirs
    assert theirs.count(film) == len(prompt.positions["vision"]) > 0
