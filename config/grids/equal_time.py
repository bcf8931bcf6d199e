# ablate.py: is an idea that costs speed still better in the same time?
#
# A run of fewer steps, planned so from the start, in place of one that is cut: a cut run's learning
# rate has not fallen yet. 4:1 attention with MuonClip has 0.95 of the speed of grouped-query
# attention, and 0.98 of that of AdamW (MEASUREMENTS.md), so 372 of 400 steps are too few rather
# than too many.

runs = {
    "gqa-swiglu": {"num_attention_heads": 12, "num_noise_heads": 0, "intermediate_size": 2096,
                   "activation": "swiglu"},
    "4to1-swiglu-adamw-lr1e-3-embed4e-3-warmup100": {
        "activation": "swiglu", "optimizer": "adamw", "lr": 1e-3, "embedding_lr_scale": 4.0,
        "warmup_steps": 100},
    "4to1-swiglu-steps372": {"activation": "swiglu", "max_steps": 372},
}
baseline = "4to1-swiglu-steps372"
