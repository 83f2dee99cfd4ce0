"""Faults of media: pictures, sounds, videos, their sizes and limits."""

from __future__ import annotations

from tests.mutations.fault import Fault

FILMS = "tests/encoders/media/test_films.py"
PICTURES = "tests/encoders/media/test_pictures.py"
SOUNDS = "tests/encoders/media/test_sounds.py"
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
        "sound.width",
        "24-bit samples are read as if their lowest byte were the highest",
        "encoders/media/sounds.py",
        "numbers[:, 1:] = ",
        "numbers[:, :3] = ",
        f"{SOUNDS}::test_counts_and_samples_are_those_of_two_decoders[WAV-PCM_24]",
    ),
    Fault(
        "film.turned",
        "films are turned the other way",
        "encoders/media/films.py",
        "round(frame.rotation / 90) % 4",
        "round(-frame.rotation / 90) % 4",
        f"{FILMS}::test_films_are_turned_as_players_turn_them[90]",
    ),
    Fault(
        "film.nearest",
        "at a variable rate frames are counted",
        "encoders/media/films.py",
        "return before if wanted - before < self.times[k] - wanted else self.times[k]",
        "return self.times[number]",
        f"{FILMS}::test_at_a_variable_rate_a_frame_is_shown_at_its_time[mp4]",
    ),
    Fault(
        "film.seek",
        "the decoder always goes back to the key frame",
        "encoders/media/films.py",
        "clock.key(time) > found.pts",
        "True",
        f"{FILMS}::test_only_what_is_needed_is_decoded",
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
