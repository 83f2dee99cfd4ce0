"""Faults in the recipes of corpora."""

from __future__ import annotations

from tests.mutations.fault import Fault

TEST = "tests/mm/data/test_corpora.py::test"

CORPORA = (
    Fault(
        "corpora.groups",
        "stamps that are linked over a third one are held out apart",
        "mm/data/corpora/split.py",
        "a, b = sorted((root(i), root(seen.setdefault(mark, i))))",
        "a, b = sorted((i, seen.setdefault(mark, i)))",
        f"{TEST}_groups_are_the_connected_parts",
    ),
    Fault(
        "corpora.recordings",
        "copies of a held-out recording are trained on",
        "mm/data/corpora/tuxpaint.py",
        "(stamp.picture, *stamp.recordings.values())",
        "(stamp.picture,)",
        f"{TEST}_linked_stamps_are_held_out_together_and_others_stay_where_they_are",
    ),
    Fault(
        "corpora.names",
        "names that differ in case alone are held out apart",
        "mm/data/corpora/tuxpaint.py",
        "stamp.names.get(ENGLISH, stamp.name).casefold()",
        "stamp.names.get(ENGLISH, stamp.name)",
        f"{TEST}_linked_stamps_are_held_out_together_and_others_stay_where_they_are",
    ),
    Fault(
        "corpora.mirror",
        "what must not be mirrored is",
        "mm/data/corpora/stamps.py",
        '"nomirror" not in options',
        '"noflip" not in options',
        f"{TEST}_a_debian_package_is_its_folder",
    ),
    Fault(
        "corpora.pairs",
        "variants of an emoji are held out apart",
        "mm/data/corpora/twemoji.py",
        "is_held_out(e.idea, seed",
        "is_held_out(e.name, seed",
        f"{TEST}_an_emoji_and_a_name_are_of_different_emojis",
    ),
)
