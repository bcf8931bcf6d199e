# ablate.py: attention and activation, at equal parameters
#
# The MLP is as wide as it takes to have 115.3 to 115.5M parameters. All attentions have 4 key
# heads. Names say how many signal heads there are for each noise head.

axes = [
    {
        "gqa": {"num_attention_heads": 12, "num_noise_heads": 0, "intermediate_size": 2096},
        "1to1": {"num_attention_heads": 12, "num_noise_heads": 6, "intermediate_size": 2096},
        "2to1": {"num_attention_heads": 12, "num_noise_heads": 4, "intermediate_size": 2008},
        "4to1": {},            # 8 signal and 2 noise heads, as in config/evidence.py
    },
    {
        "swiglu": {"activation": "swiglu"},
        "polynorm": {"activation": "poly_norm"},
    },
]
seeds = [1337, 1338, 1339]
baseline = "gqa-swiglu"
