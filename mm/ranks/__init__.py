"""A job on its ranks: launching, signals, control messages, and what each rank builds and reads.

Entry points: launch.launch_local, job.build_job, feed.Feed. The loop over steps may not enter.
"""
