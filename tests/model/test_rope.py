"""Rotary settings as transformers 5 writes them end up where mlx-lm reads them. (Logits against
transformers itself, for each architecture: tests/parity/test_architectures.py.)"""

import pytest

from mlx_simpo.model.rope import rope_repairs, with_both_rope_spellings


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        # What is there at the top level wins: the checkpoint says it twice.
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, {}),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "llama3", "rope_type": "llama3", "factor": 8.0},
            },
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0},
            },
        ),
        # Gemma 4's, which mlx-lm reads where it is.
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        (
            {"text_config": {"hidden_size": 8, "rope_parameters": {"rope_theta": 7.0}}},
            {
                "text_config": {
                    "hidden_size": 8,
                    "rope_parameters": {"rope_theta": 7.0},
                    "rope_theta": 7.0,
                }
            },
        ),
    ],
)
def test_changes(config: dict, changes: dict) -> None:
    assert rope_repairs(config) == changes
    assert rope_repairs(config | changes) == {}  # nothing left to repair


GROUPS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("config", "both"),
    [
        ({}, {}),
        (
            {"rope_theta": 5e5},
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ),
        # The older name of the type alone, as Llama 2's long versions have it.
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {
                "rope_theta": 1e4,
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
        ),
        # What mlx-lm needs for groups, and no rope_scaling, which transformers takes for all.
        (
            {"rope_parameters": GROUPS},
            {"rope_parameters": GROUPS, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        # transformers 5 reads Gemma 3's older names itself.
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_both_ways(config: dict, both: dict) -> None:
    assert with_both_rope_spellings(config) == both
    assert with_both_rope_spellings(both) == both
