"""SimPO's objective: pure functions of average log-probabilities.

With c̄ and r̄ the *average* log-probabilities of the chosen and the rejected response,

    z = beta · ((c̄ − r̄) − gamma_beta_ratio)                              (the margin, in logits)
    sigmoid: −(1 − ε) · log σ(z) − ε · log σ(−z)       hinge: max(0, 1 − z)        (per pair)
    loss = mean over pairs + sft_weight · token-mean cross-entropy of the chosen responses

Reference: Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free
Reward", 2024, arXiv:2405.14734, equations 4–6; label smoothing, the hinge and the SFT term as in
the authors' code (princeton-nlp/SimPO, scripts/simpo_trainer.py).
"""

import mlx.core as mx


def simpo_loss(
    chosen_logps: mx.array,
    rejected_logps: mx.array,
    chosen_tokens: mx.array | None = None,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    total_pairs: mx.array | float | None = None,
    total_chosen_tokens: mx.array | float | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Compute SimPO's loss over B pairs, and its metrics per pair.

    Args:
        chosen_logps, rejected_logps: [B] average log-probability of each response, in nats per
            token.
        chosen_tokens: [B] number of scored tokens of each chosen response; needed for the SFT term.
        beta: scale of the reward (> 0).
        gamma_beta_ratio: target margin over beta: the absolute margin is beta · gamma_beta_ratio.
        loss_type: "sigmoid" or "hinge".
        label_smoothing: probability ε that a pair's labels are swapped (sigmoid only).
        sft_weight: weight of the chosen responses' token-mean cross-entropy.
        total_pairs, total_chosen_tokens: the denominators, when these B pairs are a micro-batch of
            a larger batch (gradient accumulation): the micro-batches' losses and gradients then
            add up to those of the whole batch. Default: this batch's own numbers.

    Returns:
        The scalar loss, and per pair [B]: loss, sft_loss (if sft_weight), rewards/chosen and
        rewards/rejected (beta · average log-probability, without gamma), rewards/margins,
        rewards/accuracies (1 where the chosen reward is strictly greater), logps/chosen,
        logps/rejected. Each metric's value for a batch is its mean over the pairs.

    Raises:
        ValueError: an unknown loss_type, label smoothing with the hinge, an SFT term without
            chosen_tokens.
    """
    logps_margin = chosen_logps - rejected_logps
    z = beta * (logps_margin - gamma_beta_ratio)
    losses = preference_losses(z, loss_type, label_smoothing)
    pairs = losses.size if total_pairs is None else total_pairs
    metrics = {}
    if sft_weight:
        if chosen_tokens is None:
            raise ValueError("sft_weight needs chosen_tokens, the lengths of the chosen responses")
        tokens = chosen_tokens.sum() if total_chosen_tokens is None else total_chosen_tokens
        # A pair's share of the token mean, scaled so that the mean over pairs is the token mean.
        metrics["sft_loss"] = -chosen_logps * chosen_tokens * (pairs / tokens)
        losses = losses + sft_weight * metrics["sft_loss"]
    metrics |= {
        "loss": losses,
        "rewards/chosen": beta * chosen_logps,
        "rewards/rejected": beta * rejected_logps,
        "rewards/margins": beta * logps_margin,
        "rewards/accuracies": (logps_margin > 0).astype(mx.float32),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses.sum() / pairs, metrics


def preference_losses(z: mx.array, loss_type: str, label_smoothing: float) -> mx.array:
    """Compute the loss per pair [B] from the margins ``z`` [B], in logits; see `simpo_loss`.

    Raises:
        ValueError: an unknown loss_type, or label smoothing with the hinge.
    """
    if loss_type not in ("sigmoid", "hinge"):
        raise ValueError(f"loss_type is {loss_type!r}; it must be 'sigmoid' or 'hinge'")
    if loss_type == "sigmoid":
        # −log σ(z) = log(1 + e^−z), which logaddexp computes without overflow, and
        # −log σ(−z) = −log σ(z) + z, so that the smoothed loss is one term plus ε · z.
        return mx.logaddexp(0.0, -z) + label_smoothing * z
    if label_smoothing:
        raise ValueError("label_smoothing has no meaning for the hinge loss; set it to 0")
    return mx.maximum(0.0, 1.0 - z)
