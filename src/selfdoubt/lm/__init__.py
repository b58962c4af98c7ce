"""Language models: load, generate with a risk for every token, score text that exists.

``text`` turns messages into token ids and back, ``adapters`` are folders of what was added to a model.
"""
