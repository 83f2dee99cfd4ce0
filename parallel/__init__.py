"""Layouts, boundaries, schedules and the techniques of parallel training, for any modules of PyTorch.

The rooms know ranks, groups and tensors. No model, config or data may enter. Import from a room:
`from parallel.boundary import BoundaryCommunicator`.
"""
