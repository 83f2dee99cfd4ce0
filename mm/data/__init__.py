"""Data sets: an index of tar files, the order of samples, and payloads read by offset.

Entry points: index.read_or_build, order.sample_ids, reader.ShardReader. Nothing here knows ranks.
"""
