"""Audio encoders of published families: Whisper, wav2vec 2.0 and HuBERT, Parakeet; and their inputs.

Entry points: whisper.Whisper, wav2vec2.Wav2Vec2, parakeet.Parakeet, sound.Sound.

sound.py makes their inputs of samples. Weights of folders are read by encoders.hf.
"""
