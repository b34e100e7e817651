"""What frozen models and oracles say about text: computed here, never in an objective.

Everything that leaves this package is data: no gradient flows through it.
"""
