"""What a job does when something goes wrong: who is to blame, who tells it, and how all ranks end.

Each rank records what it does, posts it to the job's store once a second, and reads whether some rank has
failed.
Entry points: record.FlightRecord, blame.blame, heartbeat.Heartbeat, failure.Failure.
"""
