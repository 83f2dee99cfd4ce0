"""Plans carried out: handlers of actions in order, a backward in two halves, and stand-ins for real work.

What an action does to tensors is its handler's affair. Entry points: execute.execute, standin.run_standins.
Names are not handed on, since stand-ins need torch: its import takes seconds, and refusals come without it.
"""
