"""Copies of a run's checkpoints in a store: made beside training, read where a run resumes. The page is
docs/checkpoints_remote.md.

Entry points: copier.Copier, start.fetch_newer, start.own_target. Requests are made by mm/data/remote.
"""
