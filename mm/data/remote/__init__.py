"""Shards at s3://, gs://, https:// and hf://: ranges of objects by fsspec, tried again, kept on a local disk;
and folders of stores that checkpoints are copied to.

Entry points: shards.RemoteShards, folder.Folder. What reads data comes here through mm/data/storage.py alone.
"""
