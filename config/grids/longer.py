# ablate.py: does what pays in 52M tokens still pay in five times as many?
#
# The files of text are then read about five times.

axes = [
    {"5x": {"max_steps": 2000, "eval_every": 250}},
    {
        "4to1-swiglu": {"activation": "swiglu"},
        "gqa-swiglu": {"num_attention_heads": 12, "num_noise_heads": 0, "intermediate_size": 2096,
                       "activation": "swiglu"},
        "polynorm-scale0.0625": {"poly_norm_scale": 0.0625},
        "adamw-lr1e-3": {"activation": "swiglu", "optimizer": "adamw", "lr": 1e-3},
        "adamw-lr5e-4": {"activation": "swiglu", "optimizer": "adamw", "lr": 5e-4},
    },
]
baseline = "5x-4to1-swiglu"
