"""Can an explanation be trusted? Metrics over a run's images, beside controls, with
intervals and tests.
"""
