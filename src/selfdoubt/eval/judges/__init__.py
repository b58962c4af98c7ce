"""Judges: rules, multiple choice and other models, which say whether an answer is right."""
