"""Faults of layouts of samples, of their conversion and of the page that shows them."""

from __future__ import annotations

from tests.mutations.fault import Fault

READ = "tests/mm/data/test_layouts.py"
CONVERTED = "tests/mm/data/test_convert.py"
SHOWN = "tests/mm/pages/test_samples_page.py"
RUN = "tests/mm/pages/test_run_page.py"

LAYOUTS = (
    Fault(
        "layouts.majority",
        "a caption that has lost its picture makes its shard one of texts",
        "mm/data/layouts/tar.py",
        "counts.most_common(1)[0][0]",
        "min(counts, key=counts.__getitem__)",
        f"{READ}::test_a_shard_has_one_layout",
    ),
    Fault(
        "layouts.order",
        "pictures come in the order of the tar, not of their numbers",
        "mm/data/layouts/media.py",
        "for name in in_order(names) if",
        "for name in sorted(names) if",
        f"{READ}::test_a_tar_is_read_as_it_is",
    ),
    Fault(
        "layouts.plain",
        "what the user says is learned",
        "mm/data/layouts/conversations.py",
        'message["role"] == "assistant"',
        'message["role"] == "user"',
        f"{READ}::test_a_conversation_as_segments",
    ),
    Fault(
        "layouts.names",
        "training reads captions without the names of their media",
        "mm/data/layouts/tar.py",
        'if layout == "segments" else [n for n in names if n != part]',
        'if layout == "segments" else []',
        f"{READ}::test_a_tar_is_read_as_it_is",
    ),
    Fault(
        "convert.arrays",
        "an array in a tar is looked for beside the tar",
        "mm/data/convert/samples.py",
        "{**(record.parts or {}), **record.payloads}",
        "dict(record.payloads)",
        f"{CONVERTED}::test_arrays_of_a_tar_are_parts_as_any_others",
    ),
    Fault(
        "convert.elsewhere",
        "a path brings in a file from outside the folders of media",
        "mm/data/convert/samples.py",
        "if not path.is_relative_to(os.path.abspath(root)):",
        "if False:",
        f"{CONVERTED}::test_lines_with_paths_and_media_elsewhere",
    ),
    Fault(
        "convert.torn",
        "a shard that was torn counts as made",
        "mm/data/convert/shards.py",
        'shard.tar.stat().st_size == note["bytes"]',
        "shard.tar.is_file()",
        f"{CONVERTED}::test_neither_order_nor_restarts_change_a_byte",
    ),
    Fault(
        "page.escape",
        "what a text says acts in the page",
        "mm/pages/samples_page.py",
        'el("span", piece) for piece',
        'el("span", Markup(piece)) for piece',
        f"{SHOWN}::test_tokens_of_a_template_are_shown_and_do_not_act",
    ),
    Fault(
        "page.direction",
        "a name may turn the direction of the text after it",
        "mm/pages/html.py",
        "escape(clean(str(value)))",
        "escape(str(value))",
        f"{RUN}::test_nothing_that_a_run_says_acts",
    ),
    Fault(
        "page.spike",
        "a long curve is drawn by the lowest values alone",
        "mm/pages/curves.py",
        "max(finite, key=lambda i: found[i][1])",
        "min(finite, key=lambda i: found[i][1])",
        f"{RUN}::test_a_spike_of_one_step_in_many_thousand_is_drawn",
    ),
    Fault(
        "page.scale",
        "each timeline has a scale of its own",
        "mm/pages/timeline.py",
        "width=WIDTH, seconds=longest",
        "width=WIDTH, seconds=None",
        "tests/mm/pages/test_compare_page.py::test_timelines_have_one_scale",
    ),
)
