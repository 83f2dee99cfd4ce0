"""One file a command of the command line, and the checks that commands make before ranks start.

Entry points: preflight.check_paths, dry_run.dry_run, compare.compare, doctor.examine.
Arguments are parsed in mm/cli.py.
"""
