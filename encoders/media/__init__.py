"""Media files: what a file is by its first bytes, its sizes without decoding it, and its pixels and samples.

Entry points: probe.probe_media, decode.decode_still, decode.read_sound, limits.Limits. docs/media.md has
the formats. Nothing here keeps state, so processes may fork at any time.
"""
