"""Which layout to run: candidates, bounds that prove what need not be predicted, and the best few of them.

Entry points: plan.Planner, candidate.Candidate. Bounds of candidates are made in pieces, module by module;
what mm.predict says is asked of those alone whose bound is below what is found.
"""
