"""What many prompts begin or end with: examples, instructions, a passage that is asked about.

Prompts that share such text are not the same for that; what they are about comes after it (or before).
"""

import numpy as np

from .prompt_words import PromptWords, Spans

# A beginning (or end) of so many words that so many prompts share is a preamble if no continuation
# is in the majority. Copies of a prompt with small changes go on alike; other questions do not.
MIN_PREAMBLE_WORDS = 10
MIN_PREAMBLE_PROMPTS = 5


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
    # Down the tree of beginnings, one word at a time: `group` numbers the beginnings of `depth`
    # words that enough prompts share, `active` are these prompts.
    active, group, depth = np.arange(len(first)), np.zeros(len(first), np.int64), 0
    while len(active):
        goes_on = sizes[active] > depth
        next_words = words[first[active[goes_on]] + step * depth].astype(np.int64)
        children, child, counts = np.unique(
            group[goes_on] << 32 | next_words, return_inverse=True, return_counts=True
        )
        if depth >= MIN_PREAMBLE_WORDS:
            largest = np.zeros(int(group.max()) + 1, np.int64)
            np.maximum.at(largest, children >> 32, counts)
            goes_apart = 2 * largest <= np.bincount(group)
            result[active[goes_apart[group]]] = depth
        is_shared = counts >= MIN_PREAMBLE_PROMPTS
        numbers = np.cumsum(is_shared) - 1
        active = active[goes_on][is_shared[child]]
        group, depth = numbers[child[is_shared[child]]], depth + 1
    return result
