# ablate.py: how PolyNorm begins, with the quick start's model on a CPU
#
# The scale of PolyNorm's first weights (1/3 times it) beside SwiGLU, which has 16 parameters fewer.
# A run takes four minutes on two cores.

base = "config/quickstart.py"
runs = {
    "swiglu": {"activation": "swiglu"},
    "scale1": {"poly_norm_scale": 1.0},
    "scale0.25": {"poly_norm_scale": 0.25},
    "scale0.0625": {},               # the default
    "scale0.0156": {"poly_norm_scale": 1 / 64},
}
seeds = [1337, 1338]
baseline = "swiglu"
