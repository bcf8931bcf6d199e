# ablate.py: does what pays in 52M tokens still pay in four times as many?
#
# Most of the text is then read four times, the built-in code ten times, which is too often: the
# loss of held-out code is lowest after half of the steps.

axes = [
    {"4x": {"max_steps": 1600, "eval_every": 200}},
    {
        "4to1-swiglu": {"activation": "swiglu"},
        "gqa-swiglu": {"num_attention_heads": 12, "num_noise_heads": 0, "intermediate_size": 2096,
                       "activation": "swiglu"},
        "polynorm-scale0.0625": {"poly_norm_scale": 0.0625},
        "adamw-lr1e-3": {"activation": "swiglu", "optimizer": "adamw", "lr": 1e-3},
        "adamw-lr5e-4": {"activation": "swiglu", "optimizer": "adamw", "lr": 5e-4},
    },
]
baseline = "4x-4to1-swiglu"
