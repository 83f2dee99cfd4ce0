"""Faults of the encoders."""

from __future__ import annotations

from tests.mutations.fault import Fault

SIGLIP = "tests/encoders/test_oracles.py::test_the_vision_transformer_is_siglips"
PUBLISHED = "tests/encoders/test_published.py::test_states_and_gradients_equal_transformers"
PARAKEET = "tests/encoders/test_oracles.py::test_the_fastconformer_is_parakeets"

ENCODERS = (
    Fault(
        "vit.positions",
        "ViT has no positions",
        "encoders/vit.py",
        "return x + local(self.row_position)[row] + local(self.column_position)[column]",
        "return x",
        SIGLIP,
    ),
    Fault(
        "vit.shuffle",
        "the two rows of a block are one",
        "encoders/vit.py",
        "(across // merge)) + corner // merge",
        "(across // merge)) + corner % merge",
        SIGLIP,
    ),
    Fault(
        "vit.pixels",
        "pixels are in another range",
        "encoders/vit.py",
        ".div_(127.5).sub_(1.0)",
        ".div_(255.0)",
        "tests/encoders/test_oracles.py::test_pictures_are_cut_into_patches",
    ),
    Fault(
        "fastconformer.convolution",
        "FastConformer has no convolution",
        "encoders/fastconformer.py",
        "x = x + self._convolve(x, ctx)",
        "x = x + 0.0 * self._convolve(x, ctx)",
        PARAKEET,
    ),
    Fault(
        "fastconformer.rotary",
        "positions turn at another speed",
        "encoders/fastconformer.py",
        "frequency = 10000.0 **",
        "frequency = 1000.0 **",
        PARAKEET,
    ),
    Fault(
        "fastconformer.ends",
        "a clip sees the one before",
        "encoders/fastconformer.py",
        "(F.relu(x) if self.published else F.silu(x)) * real.view(1, 1, -1, 1)",
        "F.silu(x)",
        PARAKEET,
    ),
    Fault(
        "encoders.attention",
        "items see the padding of their batch",
        "parallel/sequence/buckets.py",
        "elif not real_key.all():",
        "elif False:",
        "tests/parallel/sequence/test_buckets.py::test_queries_see_the_keys_of_their_sequence",
    ),
    Fault(
        "encoders.reach",
        "a rank fetches one neighbour less",
        "encoders/share.py",
        "max(low, span[0] - n)",
        "max(low, span[0] - n + 1)",
        "tests/encoders/test_share.py::test_reach_is_what_a_span_sees_and_no_more",
    ),
    Fault(
        "projector.activation",
        "the projector's ReLU is not squared",
        "encoders/activations.py",
        '"relu2": lambda x: F.relu(x).square(),',
        '"relu2": F.relu,',
        "tests/encoders/test_oracles.py::test_the_projector_is_its_formula",
    ),
    Fault(
        "projector.bias",
        "a biased projector forgets its last bias",
        "encoders/projector.py",
        "return y + local(self.bias) if what.bias else y",
        "return y",
        "tests/encoders/test_projector.py::test_a_projector_is_its_formula",
    ),
    Fault(
        "vision.prefix_turns",
        "class tokens are rotated",
        "encoders/vision/position.py",
        "angle = angle * to_device(at.prefix < 0, device).to(torch.float32)[:, None]",
        "angle = angle * 1",
        f"{PUBLISHED}[dinov3]",
    ),
    Fault(
        "vision.windows",
        "windows are one row of squares too narrow",
        "encoders/vision/tokens.py",
        "at.column // window",
        "at.column // (window - 1)",
        f"{PUBLISHED}[qwen2_5_vl]",
    ),
    Fault(
        "vision.scale",
        "both branches have the scale of attention",
        "encoders/vision/block.py",
        "y * local(self.scale2)",
        "y * local(self.scale1)",
        f"{PUBLISHED}[dinov2]",
    ),
    Fault(
        "vision.prefix_share",
        "a rank that begins inside an item skips its prefix once more",
        "encoders/share.py",
        "items = bisect_left(first, row)",
        "items = bisect_left(first, row + 1)",
        "tests/encoders/test_share.py::test_prefixes_are_where_the_first_rows_are",
    ),
    Fault(
        "published.gate",
        "the two halves of a fused gated MLP are exchanged",
        "encoders/hf/vision.py",
        '(f"mlp.gate.{k}", f"mlp.up.{k}")',
        '(f"mlp.up.{k}", f"mlp.gate.{k}")',
        f"{PUBLISHED}[dinov2_giant]",
    ),
    Fault(
        "mel.filters",
        "the power spectrum is an amplitude",
        "encoders/compat.py",
        "power = spectrum.abs().square()",
        "power = spectrum.abs()",
        "tests/encoders/test_encoders.py::test_both_paths_of_the_imports_agree",
    ),
)
