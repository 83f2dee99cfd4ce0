"""Data sets: an index of tar files, the order of samples, and payloads read by offset.

Entry points: index.load_index, reader.ShardReader, sample.Sample. Nothing here knows ranks.
"""
