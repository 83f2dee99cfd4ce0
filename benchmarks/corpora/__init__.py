"""Figures of the jobs on real corpora (docs/corpora.md)."""
