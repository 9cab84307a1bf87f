"""What is wrong with a network: marks that it takes for a class, groups in what it does, and
what changed.
"""
