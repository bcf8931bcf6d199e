# ablate.py: MuonClip, its parts, and AdamW at learning rates by factors of two
#
# All with 4:1 attention and SwiGLU. AdamW is run with three lengths of warm-up. With both
# optimizers AdamW trains the embedding, which is the head, too: at 4e-3 in the runs with MuonClip.
# embed4e-3, say, tells that it learns at that rate, whatever all else learns at.

axes = [
    {"4to1-swiglu": {"activation": "swiglu"}},
    {
        "": {},                # MuonClip, as in the other grids
        "muon": {"qk_clip_threshold": 0.0},                    # without QK-clip
        "muonclip-quintic": {"ns_coefficients": "quintic"},    # other coefficients of Newton-Schulz
        "muonclip-polar": {"ns_coefficients": "polar_express"},
        "adamw-lr3e-4": {"optimizer": "adamw", "lr": 3e-4},
        "adamw-lr5e-4": {"optimizer": "adamw", "lr": 5e-4},
        "adamw-lr1e-3": {"optimizer": "adamw", "lr": 1e-3},
        "adamw-lr2e-3": {"optimizer": "adamw", "lr": 2e-3},
        "adamw-lr4e-3": {"optimizer": "adamw", "lr": 4e-3},
        "adamw-lr5e-4-embed4e-3": {"optimizer": "adamw", "lr": 5e-4, "embedding_lr_scale": 8.0},
        "adamw-lr1e-3-embed4e-3": {"optimizer": "adamw", "lr": 1e-3, "embedding_lr_scale": 4.0},
        "adamw-lr2e-3-embed4e-3": {"optimizer": "adamw", "lr": 2e-3, "embedding_lr_scale": 2.0},
        "adamw-lr1e-3-embed8e-3": {"optimizer": "adamw", "lr": 1e-3, "embedding_lr_scale": 8.0},
        "muonclip-embed1e-3": {"embedding_lr_scale": 0.25},
        "adamw-lr1e-3-warmup100": {"optimizer": "adamw", "lr": 1e-3, "warmup_steps": 100},
        "adamw-lr1e-3-embed4e-3-warmup100": {"optimizer": "adamw", "lr": 1e-3,
                                             "embedding_lr_scale": 4.0, "warmup_steps": 100},
        "adamw-lr2e-3-embed4e-3-warmup100": {"optimizer": "adamw", "lr": 2e-3,
                                             "embedding_lr_scale": 2.0, "warmup_steps": 100},
        "adamw-lr1e-3-embed4e-3-warmup200": {"optimizer": "adamw", "lr": 1e-3,
                                             "embedding_lr_scale": 4.0, "warmup_steps": 200},
        "warmup100": {"warmup_steps": 100},                    # MuonClip
        "adamw-lr2e-3-warmup100": {"optimizer": "adamw", "lr": 2e-3, "warmup_steps": 100},
        "adamw-lr4e-3-warmup100": {"optimizer": "adamw", "lr": 4e-3, "warmup_steps": 100},
    },
]
baseline = "4to1-swiglu"
