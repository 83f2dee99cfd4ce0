"""Plug-ins and programs to copy from. Each is whole by itself, so they repeat each other on purpose."""
