"""What many prompts begin or end with: examples, instructions, a passage that is asked about.

Prompts are not the same because they share such text: what they are about comes after it.
"""

from collections import deque

import numpy as np

from .prompt_words import PromptWords, Spans

# A beginning (or end) of so many words that so many prompts share is a preamble if no continuation
# by LOOK_AHEAD words is in the majority. Copies of a prompt with small changes go on alike; other
# questions after the same instructions do not, though many begin with the same word.
MIN_PREAMBLE_WORDS = 10
MIN_PREAMBLE_PROMPTS = 5
LOOK_AHEAD = 3
_END = 2**32  # the word that follows the last one


def bodies(prompts: PromptWords, spans: Spans) -> Spans:
    """Return these prompts without the preambles at their beginnings and ends.

    Where the two would leave nothing, only the longer of them is taken away.
    """
    sizes = spans.ends - spans.starts
    lead = preamble_sizes(prompts.words, spans.starts, sizes, 1)
    tail = preamble_sizes(prompts.words, spans.ends - 1, sizes, -1)
    is_all = lead + tail >= sizes
    starts = spans.starts + np.where(is_all & (tail > lead), 0, lead)
    return Spans(starts, spans.ends - np.where(is_all & (tail <= lead), 0, tail))


def preamble_sizes(
    words: np.ndarray, first: np.ndarray, sizes: np.ndarray, step: int
) -> np.ndarray:
    """Return how many words at the beginning of each prompt are a preamble: int [N].

    Args:
        words: see `PromptWords`. first: index in ``words`` of each prompt's first word.
        sizes: number of its words. step: 1; or −1 to go backwards, with the last word as the first.
    """
    result = np.zeros(len(first), np.int64)
    # Down the tree of beginnings, one word at a time. Of each of the last few depths: the prompts
    # whose beginning others share, and the number of this beginning.
    levels = deque([(np.arange(len(first)), np.zeros(len(first), np.int64))])
    depth = 0
    while len(levels[0][0]):
        if len(levels) > LOOK_AHEAD:
            prompts, beginnings = levels.popleft()
            if depth - LOOK_AHEAD >= MIN_PREAMBLE_WORDS:
                is_preamble = _goes_apart(prompts, beginnings, *levels[-1])
                result[prompts[is_preamble[beginnings]]] = depth - LOOK_AHEAD
        prompts, beginnings = levels[-1]
        has_word = sizes[prompts] > depth
        next_words = np.full(len(prompts), _END)
        next_words[has_word] = words[first[prompts[has_word]] + step * depth]
        _, child, counts = np.unique(
            beginnings * 2 * _END + next_words, return_inverse=True, return_counts=True
        )
        # Smaller groups are no majority of MIN_PREAMBLE_PROMPTS.
        is_shared = 2 * counts > MIN_PREAMBLE_PROMPTS
        numbers = np.cumsum(is_shared) - 1
        # Prompts whose words are the same would never go apart.
        goes_on = is_shared[child] & (depth < sizes[prompts] + LOOK_AHEAD)
        levels.append((prompts[goes_on], numbers[child[goes_on]]))
        depth += 1
    return result


def _goes_apart(
    prompts: np.ndarray, beginnings: np.ndarray, later: np.ndarray, continuations: np.ndarray
) -> np.ndarray:
    """Return which beginnings enough prompts share, most of which go on differently: bool [n].

    Args:
        prompts, beginnings: sorted indices, and the number of each one's beginning, int [N].
        later, continuations: those of them whose continuation others share, and its number.
    """
    counts = np.bincount(beginnings)
    largest = np.zeros(len(counts), np.int64)
    if len(later):
        parents = beginnings[np.searchsorted(prompts, later)]
        np.maximum.at(largest, parents, np.bincount(continuations)[continuations])
    return (counts >= MIN_PREAMBLE_PROMPTS) & (2 * largest <= counts)
