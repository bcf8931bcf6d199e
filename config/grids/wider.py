# ablate.py: should PolyNorm begin small in a model as wide as the 12.7B one, too?
#
# Three layers of the shape of config/motif2_12b.py, on 4.2M tokens; all else is
# config/evidence.py's. There the output of a fresh PolyNorm is no larger than that of SiLU, so the
# reason to begin it small in narrow models does not apply. It does better all the same
# (MEASUREMENTS.md, "Does each idea pay?").

axes = [
    {"wide": {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 3,
              "num_attention_heads": 40, "num_noise_heads": 8, "num_key_value_heads": 16,
              "head_dim": 128, "lr": 1e-3, "max_steps": 64, "batch_tokens": 65536,
              "micro_batch_tokens": 32768, "warmup_steps": 10, "eval_every": 32,
              "eval_tokens": 65536}},
    {
        "swiglu": {"activation": "swiglu"},
        "polynorm": {"activation": "poly_norm"},
        "polynorm-scale0.0625": {"poly_norm_scale": 0.0625},
    },
]
baseline = "wide-swiglu"
