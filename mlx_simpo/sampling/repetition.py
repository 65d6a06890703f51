"""How much a response repeats itself: the sign of a model that is being destroyed."""

from collections.abc import Hashable, Sequence

# Four tokens are about three words: phrases that a good response, too, has more than once are
# mostly shorter. Tokens, because not every language puts spaces between its words.
NGRAM = 4


def repeated_share(tokens: Sequence[Hashable]) -> float:
    """Return the share of the 4-grams of ``tokens`` that occurred before, from 0 to 1.

    0 for fewer than five tokens, which have no second 4-gram.
    """
    ngrams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
