"""Data: WebDataset shards with an index, read straight from the tar, in an order that is a pure function."""
