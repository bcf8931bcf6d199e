# ablate.py: the ideas one by one, with the quick start's model on a CPU
#
# "default" is the quick start itself. The scale of PolyNorm's first weights is 1/16 there. A run
# takes four minutes on two cores.

base = "config/quickstart.py"
runs = {
    "default": {},
    "gqa": {"num_attention_heads": 8, "num_noise_heads": 0, "intermediate_size": 875},
    "swiglu": {"activation": "swiglu"},
    "scale1": {"poly_norm_scale": 1.0},
    "scale0.25": {"poly_norm_scale": 0.25},
    "scale0.0156": {"poly_norm_scale": 1 / 64},
    "adamw-lr5e-4": {"optimizer": "adamw", "lr": 5e-4},
    "adamw-lr1e-3": {"optimizer": "adamw", "lr": 1e-3},
    "adamw-lr2e-3": {"optimizer": "adamw", "lr": 2e-3},
    "adamw-lr4e-3": {"optimizer": "adamw", "lr": 4e-3},
    "adamw-lr1e-3-embed8e-3": {"optimizer": "adamw", "lr": 1e-3, "embedding_lr_scale": 8.0},
    "adamw-lr2e-3-embed8e-3": {"optimizer": "adamw", "lr": 2e-3, "embedding_lr_scale": 4.0},
    "warmup70": {"warmup_steps": 70},                          # of 280; 20 are the default
    "adamw-lr1e-3-embed8e-3-warmup70": {"optimizer": "adamw", "lr": 1e-3,
                                        "embedding_lr_scale": 8.0, "warmup_steps": 70},
    "adamw-lr2e-3-embed8e-3-warmup70": {"optimizer": "adamw", "lr": 2e-3,
                                        "embedding_lr_scale": 4.0, "warmup_steps": 70},
    "adamw-lr1e-3-embed8e-3-warmup140": {"optimizer": "adamw", "lr": 1e-3,
                                         "embedding_lr_scale": 8.0, "warmup_steps": 140},
    "adamw-lr2e-3-embed8e-3-warmup140": {"optimizer": "adamw", "lr": 2e-3,
                                         "embedding_lr_scale": 4.0, "warmup_steps": 140},
    "mean": {"mixture": [
        [0, {"language": 0.35, "code": 0.30, "math": 0.20, "science": 0.15}]]},
}
seeds = [1337, 1338]
baseline = "default"
