"""Real jobs with real faults: signals, kills, plug-ins that hang."""
