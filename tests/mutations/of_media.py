"""Faults of media: pictures, sounds, videos, their sizes and limits."""

from __future__ import annotations

from tests.mutations.fault import Fault

PICTURES = "tests/encoders/media/test_pictures.py"
MEDIA = (
    Fault(
        "picture.alpha",
        "what is transparent is black",
        "encoders/media/pictures.py",
        "(255, 255, 255, 255)",
        "(0, 0, 0, 255)",
        f"{PICTURES}::test_what_is_transparent_is_white",
    ),
    Fault(
        "picture.turned",
        "the index has height and width of a picture that lies on its side",
        "encoders/media/pictures.py",
        "image.size if turned else reversed(image.size)",
        "reversed(image.size)",
        f"{PICTURES}::test_every_orientation_is_upright_and_known_before_decoding[JPEG]",
    ),
    Fault(
        "picture.rotate",
        "pictures are turned the other way",
        "encoders/media/pictures.py",
        "6: Transpose.ROTATE_270",
        "6: Transpose.ROTATE_90",
        f"{PICTURES}::test_every_orientation_is_upright_and_known_before_decoding[JPEG]",
    ),
    Fault(
        "picture.sixteen",
        "16-bit grey is clipped",
        "encoders/media/pictures.py",
        "(np.asarray(image) >> 8)",
        "np.asarray(image).clip(0, 255)",
        f"{PICTURES}::test_sixteen_bits_keep_their_upper_half",
    ),
    Fault(
        "limits.config",
        "limits of a config are not looked at",
        "mm/plan/inputs.py",
        "self.limits.check(part.meta, part.size)",
        "pass",
        "tests/mm/test_bad_input.py::test_bad_input_is_named[limit of a config, trained]",
    ),
)
