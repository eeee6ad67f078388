"""Named settings of the diffusion process: what every scheduler takes beside vocab_size."""

from typing import Any

DEFAULT_PRESET = "vocab_aware"

SCHEDULER_PRESETS: dict[str, dict[str, Any]] = {
    # follows the vocabulary: the softmax of a clean vertex keeps 0.305 for its token at every V,
    # and training and sampling spend their times where noise hides some tokens and not all
    "vocab_aware": {
        "num_train_timesteps": 5000,
        "simplex_value": "auto",
        "beta_schedule": "squaredcos_improved_ddpm",
        "cosine_s": 1e-4,
        "timestep_spacing": "recoverability",
        "timestep_density": "recoverability",
        "timestep_uniform_share": 0.5,
    },
    # as published for V = 50,265 (arXiv 2305.08379 and its code)
    "tess": {
        "num_train_timesteps": 5000,
        "simplex_value": 5.0,
        "beta_schedule": "squaredcos_improved_ddpm",
        "cosine_s": 1e-4,
        "timestep_spacing": "uniform",
        "timestep_density": "uniform",
    },
}
