"""Encoded pairs → prompts that run once, responses of similar length on top of them, and the
indices of the hidden states that predict a scored token.

Nothing is padded unless that is cheaper: a forward pass of its own costs as much as
`Figures.pass_cost` positions, so sequences share a pass where the padding, or the prompt tokens
that run twice for it, cost less than that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data.encode import EncodedPair, TokenizedSequence
from .plan import arrange, input_length, shared_prefix_length


@dataclass(frozen=True)
class SharedPrefixBatch:
    """B pairs as B prefixes and 2B continuations; continuation s < B is chosen, s ≥ B rejected.

    prefix_tokens: int32 [B, P], the first P tokens of each pair, P ≥ 0; or [B, P + T], the whole of
        one of its sequences, padded as in ``groups``, which then has the other ones.
    prefix_length: P.
    groups: of continuations that run in one pass, (tokens, prefix_index): int32 [n, T], padded on
        the right with 0, and int32 [n], the prefix that each follows; None for all prefixes in
        their order, once or several times.
    hidden_indices: int32 [N], the hidden states that predict a scored token, numbered through the
        pass of the prefixes, if it has whole sequences, and all groups: row by row, positions of
        padding included.
    targets: int32 [N], the token that each predicts.
    logp_indices: int32 [2B, S], which of the N predictions belong to each sequence, padded on the
        right with 0.
    response_lengths: int32 [2B], how many of the predictions belong to each sequence.
    padding: positions that hold no token.
    """

    prefix_tokens: mx.array
    prefix_length: int
    groups: tuple[tuple[mx.array, mx.array | None], ...]
    hidden_indices: mx.array
    targets: mx.array
    logp_indices: mx.array
    response_lengths: mx.array
    padding: int

    @property
    def arrays(self) -> tuple:
        """What `shared_prefix.shared_prefix_logps` computes with, in the order of its arguments."""
        return (
            self.prefix_tokens,
            self.groups,
            self.hidden_indices,
            self.targets,
            self.logp_indices,
            self.response_lengths,
            self.prefix_length,
        )

    @property
    def positions(self) -> int:
        """Tokens that the trunk processes, padding included."""
        return self.prefix_tokens.size + sum(tokens.size for tokens, _ in self.groups)

    @property
    def passes(self) -> int:
        """Forward passes of the trunk."""
        return len(self.groups) + (self.prefix_tokens.size > 0)


def collate_shared(
    pairs: Sequence[EncodedPair], pass_cost: int, *, extends_prefix: bool = False
) -> SharedPrefixBatch:
    """Divide the pairs' sequences into prefixes and continuations.

    All prefixes have the length of the shortest one; the rest of a longer prompt goes in front of
    its responses. The last token of a sequence predicts nothing and is not run.

    Args:
        pass_cost, extends_prefix: see `plan.arrange`.
    """
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    prefix_length = min(shared_prefix_length(pair) for pair in pairs)
    arranged = arrange(pairs, prefix_length, pass_cost, extends_prefix=extends_prefix)
    prefix_tokens = np.stack([p.chosen.tokens[:prefix_length] for p in pairs]).astype(np.int32)
    logp_indices = np.zeros((len(sequences), max(s.num_scored for s in sequences)), np.int32)
    groups, hidden_indices, targets = [], [], []
    num_hidden = num_logps = padding = 0
    passes = [(arranged.first, 0)] if arranged.first else []
    for members, start in passes + [(group, prefix_length) for group in arranged.groups]:
        tokens = _tokens_from(start, [sequences[s] for s in members])
        if members is arranged.first:
            prefix_tokens = tokens
        else:
            prefix_index = [s % len(pairs) for s in members]
            in_order = prefix_index == [*range(len(pairs))] * (len(members) // len(pairs))
            groups.append((mx.array(tokens), None if in_order else mx.array(prefix_index)))
        for row, s in enumerate(members):
            sequence = sequences[s]
            # The index that the hidden state of token 0 has, or would have if it ran in this pass.
            first = num_hidden + row * tokens.shape[1] - start
            hidden_indices.append(
                first + np.arange(sequence.score_start - 1, input_length(sequence))
            )
            targets.append(sequence.tokens[sequence.score_start :])
            last = num_logps + sequence.num_scored
            logp_indices[s, : sequence.num_scored] = np.arange(num_logps, last)
            num_logps = last
            padding += tokens.shape[1] - (input_length(sequence) - start)
        num_hidden += tokens.size
    return SharedPrefixBatch(
        mx.array(prefix_tokens),
        prefix_length,
        tuple(groups),
        mx.array(np.concatenate(hidden_indices).astype(np.int32)),
        mx.array(np.concatenate(targets).astype(np.int32)),
        mx.array(logp_indices),
        mx.array([s.num_scored for s in sequences], mx.int32),
        padding,
    )


def _tokens_from(start: int, sequences: Sequence[TokenizedSequence]) -> np.ndarray:
    """Return the tokens from index ``start`` on but the last: int32 [n, T], padded with 0."""
    width = max(input_length(s) for s in sequences) - start
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, s in zip(tokens, sequences, strict=True):
        row[: input_length(s) - start] = s.tokens[start:-1]
    return tokens
