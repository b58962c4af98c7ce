"""Language models: load, decode with a risk for every token, score text that exists."""
