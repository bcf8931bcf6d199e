# ablate.py: is PolyNorm still level with SwiGLU in a model of twice the layers?
#
# 24 layers of width 512 have about as many parameters as the 12 of width 768 in config/evidence.py.

axes = [
    {"24layers": {"num_hidden_layers": 24, "hidden_size": 512, "intermediate_size": 1376}},
    {
        "4to1-swiglu": {"activation": "swiglu"},
        "polynorm-scale0.0625": {"poly_norm_scale": 0.0625},
    },
]
baseline = "24layers-4to1-swiglu"
