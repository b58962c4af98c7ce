"""The making of the pocket model: atlas, facts, questions, the base model (``make``), its voters (``voters``).

Run from a checkout: ``python -m recipes.pocket.make`` and ``python -m recipes.pocket.voters``.
"""
