"""Reading, decoding and feeding of data."""
