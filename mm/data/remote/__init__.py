"""Shards at s3://, gs://, https:// and hf://: ranges of objects by fsspec, tried again, kept on a local disk.

Entry points: shards.RemoteShards. Other rooms come here through mm/data/storage.py alone.
"""
