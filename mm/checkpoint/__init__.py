"""What a job saves, where it resumes, and published weights in and out.

Entry points: saver.Saver, resume.find, weights.start_from. Files are written by parallel.checkpoint.
"""
