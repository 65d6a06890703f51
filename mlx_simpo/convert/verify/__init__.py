"""Verification: what a conversion wrote, compared by logits with what it was made of."""
