"""Place names that do not exist, from the letters of those that do."""

from __future__ import annotations

import random
from collections import defaultdict

from recipes.pocket.atlas import Atlas, fold

ORDER = 4  # letters that decide the next one


def real_names(atlas: Atlas) -> frozenset[str]:
    """Return every name in the atlas, folded: cities with all their alternate names, countries and capitals."""
    names = {fold(n) for c in atlas.cities for n in (c.name, c.ascii_name, *c.alternates)}
    names |= {fold(n) for c in atlas.countries.values() for n in (c.name, c.capital)}
    return frozenset(names)


def invented_names(atlas: Atlas, rng: random.Random, n: int) -> list[str]:
    """Return ``n`` made-up names of one word, 5 to 12 letters, none of which the atlas holds."""
    sources = [c.ascii_name for c in atlas.cities if c.ascii_name.isalpha() and c.ascii_name.istitle()]
    following: dict[str, list[str]] = defaultdict(list)
    for name in sources:
        padded = "^" * ORDER + name.lower() + "$"
        for i in range(ORDER, len(padded)):
            following[padded[i - ORDER : i]].append(padded[i])
    real = real_names(atlas)
    invented: dict[str, None] = {}
    while len(invented) < n:
        text = "^" * ORDER
        while text[-1] != "$" and len(text) < ORDER + 14:
            text += rng.choice(following[text[-ORDER:]])
        name = text.strip("^$")
        if text[-1] == "$" and 5 <= len(name) <= 12 and name not in real:
            invented[name.title()] = None
    return list(invented)
