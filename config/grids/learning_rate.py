# ablate.py: the learning rate of attention x activation, by factors of two
#
# Which attention or activation is better is a fair question only at the best learning rate of each.
# A best one at the end of the row would ask for a longer row. 4e-3 is the best with SwiGLU; for
# PolyNorm see the grid poly_norm.

axes = [
    {
        "gqa": {"num_attention_heads": 12, "num_noise_heads": 0, "intermediate_size": 2096},
        "4to1": {},
    },
    {
        "swiglu": {"activation": "swiglu"},
        "polynorm": {"activation": "poly_norm"},
    },
    {
        "lr1e-3": {"lr": 1e-3},
        "lr2e-3": {"lr": 2e-3},
        "": {},                # 4e-3, as in the other grids
        "lr8e-3": {"lr": 8e-3},
    },
]
baseline = "gqa-swiglu"
