# ablate.py: is an idea that costs speed still better in the same time?
#
# A run of fewer steps, planned so from the start, in place of one that is cut: a cut run's learning
# rate has not fallen yet. On the two cards of one H200 machine 4:1 attention with MuonClip reached
# 0.93 of the speed of grouped-query attention, and 0.87 of the speed of AdamW. (MEASUREMENTS.md)

runs = {
    "gqa-swiglu": {"num_attention_heads": 12, "num_noise_heads": 0, "intermediate_size": 2096,
                   "activation": "swiglu"},
    "4to1-swiglu-steps372": {"activation": "swiglu", "max_steps": 372},
    "4to1-swiglu-adamw-lr1e-3-embed4e-3": {"activation": "swiglu", "optimizer": "adamw",
                                           "lr": 1e-3, "embedding_lr_scale": 4.0},
    "4to1-swiglu-steps348": {"activation": "swiglu", "max_steps": 348},
}
baseline = "gqa-swiglu"
