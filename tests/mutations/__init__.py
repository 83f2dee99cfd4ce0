"""Faults of one line each, put into a copy of the sources, that named tests must catch (docs/testing.md)."""
