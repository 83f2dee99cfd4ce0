"""The order of samples: shuffles without a permutation in memory, blends of sources, packing. All pure.

Entry points: stream.Stream, blend.Blend. Nothing here knows what a sample is, nor ranks.
"""
