"""Benchmarks of data: the order of samples, packing, reading, decoding and feeding."""
