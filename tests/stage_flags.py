"""Flags of the stages behind SFT, frozen as in test_config.py: flag -> (type, choices)."""

SHARED = {"tensor_parallel", "context_parallel"}  # a process has whole layers and whole rows
NO_BATCHES = SHARED | {
    "loss_on",
    "cache_dir",
    "packing",
    "curriculum",
    "num_workers",
    "accumulation_steps",
}
ROLLOUTS = {
    "max_new_tokens": ("int", None),
    "temperature": ("float", None),
    "reward": ("str, one or more", None),
    "sample_interval": ("int", None),
    "kl_beta": ("float", None),
    "mini_batches": ("int", None),
}
PAIRS = {"eval_data": ("str", None)}
# Stage -> (flags of SFT that it has not, flags of its own).
LATER_STAGES = {
    "train_lora": (
        SHARED | {"preview", "drop_last"},
        {
            "optimizer": (
                "str",
                ("adamw", "muon"),
            ),  # LAMB never leaves the 0 that adapters begin at
            "lora_rank": ("int", None),
            "lora_alpha": ("float", None),
            "lora_dropout": ("float", None),
            "lora_targets": ("str, one or more", None),
        },
    ),
    "train_distillation": (
        SHARED | {"preview", "drop_last"},
        {
            "teacher_weight": ("str", None),
            "kl": ("str", ("forward", "reverse", "js")),
            "kl_weight": ("float", None),
            "kl_temperature": ("float", None),
        },
    ),
    "train_reward": (SHARED | {"loss_on", "drop_last"}, PAIRS),
    "train_dpo": (
        SHARED | {"loss_on", "drop_last"},
        PAIRS
        | {
            "loss_type": ("str", ("sigmoid", "ipo", "simpo")),
            "beta": ("float", None),
            "label_smoothing": ("float", None),
            "simpo_gamma": ("float", None),
            "sft_weight": ("float", None),
            "cache_reference": ("int", (0, 1)),
        },
    ),
    "train_grpo": (
        NO_BATCHES,
        ROLLOUTS
        | {
            "group_size": ("int", None),
            "loss_type": ("str", ("grpo", "dr_grpo", "dapo", "cispo", "gspo")),
            "clip_low": ("float", None),
            "clip_high": ("float", None),
            "updates_per_rollout": ("int", None),
        },
    ),
    "train_ppo": (
        NO_BATCHES,
        ROLLOUTS
        | {
            "critic_weight": ("str", None),
            "clip": ("float", None),
            "value_clip": ("float", None),
            "value_weight": ("float", None),
            "gamma": ("float", None),
            "gae_lambda": ("float", None),
            "ppo_epochs": ("int", None),
        },
    ),
}
