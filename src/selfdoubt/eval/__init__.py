"""Evaluation: ask a set of questions and judge the answers."""
