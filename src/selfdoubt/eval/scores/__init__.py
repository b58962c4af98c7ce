"""Scores from several answers to one question: semantic entropy, self-consistency, P(True)."""
