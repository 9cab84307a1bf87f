"""Network dissection: which unit of a network detects which concept, with a null and in
words.
"""
