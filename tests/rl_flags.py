"""Flags of the stages that learn by trying, frozen as those in test_config.py: flag -> (type, choices)."""

RL_WITHOUT = {"cache_dir", "packing", "num_workers", "accumulation_steps", "tensor_parallel", "context_parallel"}
ROLLOUTS = {
    "max_new_tokens": ("int", None),
    "temperature": ("float", None),
    "reward": ("str, one or more", None),
    "sample_interval": ("int", None),
    "kl_beta": ("float", None),
    "mini_batches": ("int", None),
}
RL_FLAGS = {
    "train_grpo": ROLLOUTS | {
        "group_size": ("int", None),
        "loss_type": ("str", ("grpo", "dr_grpo", "dapo", "cispo", "gspo")),
        "clip_low": ("float", None),
        "clip_high": ("float", None),
        "updates_per_rollout": ("int", None),
    },
    "train_ppo": ROLLOUTS | {
        "critic_weight": ("str", None),
        "clip": ("float", None),
        "value_clip": ("float", None),
        "value_weight": ("float", None),
        "gamma": ("float", None),
        "gae_lambda": ("float", None),
        "ppo_epochs": ("int", None),
    },
}
