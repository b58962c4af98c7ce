"""Evaluation: a model is asked a set of questions, and its answers are kept, judged and scored.

``judges`` say what is right, ``scores`` compare several answers to one question.
"""
