"""Vision transformers of published families: one core with switches, at any resolution.

Entry points: model.VisionTransformer, config.VisionConfig, families.Siglip. Weights of folders are read by
encoders.hf.
"""
