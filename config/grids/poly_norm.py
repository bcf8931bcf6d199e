# ablate.py: why PolyNorm loses to SwiGLU in a short run: does it begin too large, or do its four
# scalars learn too slowly or too fast?
#
# A fresh PolyNorm returns numbers of a root mean square of 0.71, whatever its input's. SiLU of a
# fresh gate_proj returns 0.30, which PolyNorm does at a scale of 0.42. The default is 1/16 since
# these runs, but config/evidence.py begins with 1. The first two runs are those of the same names
# in config/grids/attention.py. lr8 means: the four scalars at 8 times the learning rate; lr8e-3:
# all parameters at 8e-3.

runs = {
    "4to1-swiglu": {"activation": "swiglu"},
    "4to1-polynorm": {"activation": "poly_norm"},
    "polynorm-scale0.5": {"poly_norm_scale": 0.5},
    "polynorm-scale0.25": {"poly_norm_scale": 0.25},
    "polynorm-scale0.125": {"poly_norm_scale": 0.125},
    "polynorm-scale0.0625": {"poly_norm_scale": 0.0625},
    "polynorm-scale0.03125": {"poly_norm_scale": 0.03125},
    "polynorm-scale0.0625-lr2e-3": {"poly_norm_scale": 0.0625, "lr": 2e-3},
    "polynorm-scale0.0625-lr8e-3": {"poly_norm_scale": 0.0625, "lr": 8e-3},
    "polynorm-lr0.125": {"poly_norm_lr_scale": 0.125},
    "polynorm-lr8": {"poly_norm_lr_scale": 8.0},
    "polynorm-scale0.125-lr0.125": {"poly_norm_scale": 0.125, "poly_norm_lr_scale": 0.125},
    "polynorm-scale0.125-lr8": {"poly_norm_scale": 0.125, "poly_norm_lr_scale": 8.0},
    "polynorm-scale0.25-lr8": {"poly_norm_scale": 0.25, "poly_norm_lr_scale": 8.0},
}
baseline = "4to1-swiglu"
