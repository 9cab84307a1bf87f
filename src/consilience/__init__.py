"""Explain what a vision model looks at, hold explanations against each other, and say whether to believe them."""
