"""Published relatives of GRPO as settings of `GRPOConfig`: a preset is a set of values, never a branch in the code.

A value that the paper does not give stays at the default, and a comment says so.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300, section 4.1 and 4.2: 64 completions, KL 0.04 in the loss; the clip range is not given.
    "grpo": {"completions_per_prompt": 64, "kl_coef": 0.04, "kl_estimator": "k3"},
    # Understanding R1-Zero-like training, arXiv 2503.20783: no division by deviation or length; 8 completions.
    "dr_grpo": {"scale": "none", "aggregation": "constant_length"},
    # DAPO, arXiv 2503.14476, section 3: clip-higher, tokens averaged in each group, dynamic sampling, soft overlong
    # punishment over the last 4,096 of 20,480 tokens. The limit on rounds is from the authors' code.
    "dapo": {
        "completions_per_prompt": 16,
        "clip_range": 0.2,
        "clip_range_high": 0.28,
        "aggregation": "group_token_mean",
        "overlong_buffer_tokens": 4096,
        "dynamic_sampling_rounds": 10,
    },
    # GSPO, arXiv 2507.18071: the geometric mean of the token ratios; clip range of section 5.1.
    "gspo": {"ratio": "sequence_mean", "clip_range": 3e-4, "clip_range_high": 4e-4},
    # MiniMax-M1, arXiv 2506.13585, eqs. 4-5. No lower bound. The upper bound is not published; ScaleRL
    # (arXiv 2510.13786) uses weights up to 5.
    "cispo": {
        "surrogate": "clipped_weight",
        "clip_range": 1.0,
        "clip_range_high": 4.0,
        "aggregation": "token_mean",
    },
    # Back to basics, arXiv 2402.14740: REINFORCE on whole completions, KL in the score; 4 completions, KL 0.03.
    "rloo": {
        "completions_per_prompt": 4,
        "center": "leave_one_out",
        "scale": "none",
        "surrogate": "score",
        "aggregation": "constant_length",
        "constant_length": 1,
        "kl_coef": 0.03,
        "kl_placement": "score",
    },
    # REINFORCE++, arXiv 2501.03262: one completion, KL as a return-to-go, whitening over the tokens of the step. The KL
    # coefficient is that of the authors' library (OpenRLHF). With completions_per_prompt > 1 and center "group_mean" it is
    # the paper's variant with a baseline.
    "reinforce_pp": {
        "completions_per_prompt": 1,
        "center": "none",
        "scale": "none",
        "whiten_tokens": True,
        "aggregation": "token_mean",
        "kl_coef": 0.01,
        "kl_placement": "return_to_go",
    },
}
