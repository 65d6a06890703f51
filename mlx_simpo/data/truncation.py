"""Cut a pair that is too long: the prompt on the left, then the responses on the right."""

from typing import NamedTuple

# (tokens, score_start) of the chosen and of the rejected sequence.
Sequences = tuple[tuple[list[int], int], tuple[list[int], int]]


class Truncated(NamedTuple):
    """The sequences, and how many tokens were cut, of (the prompt, both responses together)."""

    sequences: Sequences
    cuts: tuple[int, int]


def truncate(
    sequences: Sequences,
    max_length: int,
    max_prompt_length: int,
    bos: int | None,
) -> Truncated:
    """Cut both sequences to ``max_length`` tokens.

    The prompt loses tokens from the left, but not BOS, and not more than leaves
    ``max_prompt_length`` of them; then the responses lose tokens from the right.

    Args:
        sequences: where one has a longer prompt than the other, both lose the same tokens: as many
            as the shorter one can spare.
        bos: id of the BOS token, or None.
    """
    excess = max(0, max(len(tokens) for tokens, _ in sequences) - max_length)
    prompt_length = min(start for _, start in sequences)
    cut = min(excess, max(0, prompt_length - max_prompt_length))
    num_bos = 1 if cut and sequences[0][0][0] == bos else 0
    uncut = [tokens[:num_bos] + tokens[num_bos + cut :] for tokens, _ in sequences]
    short = [tokens[:max_length] for tokens in uncut]
    cut_response = sum(map(len, uncut)) - sum(map(len, short))
    (_, chosen_start), (_, rejected_start) = sequences
    shortened = ((short[0], chosen_start - cut), (short[1], rejected_start - cut))
    return Truncated(shortened, (cut, cut_response))
