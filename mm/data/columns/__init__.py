"""The index of a data set as columns in memory-mapped files: shards, samples, payloads, segments.

Entry points: store.Store, entries.index_columns, samples.Samples. A sample is a view, made when asked for.
"""
