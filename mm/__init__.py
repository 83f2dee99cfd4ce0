"""Multimodal jobs: configs, data, plans, ranks, training and the command line.

It is an application. Nothing below may import it.
"""
