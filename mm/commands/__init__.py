"""One file a command of the command line (its options and what runs it), and what only commands need.

Entry points: command.Command, preflight.check_paths, dry_run.dry_run, doctor.examine.
mm/cli.py parses arguments and picks the command. Commands import torch only once their arguments are right.
"""
