# ablate.py: is PolyNorm still behind SwiGLU in the quick start's model after three times the steps?

base = "config/quickstart.py"
axes = [
    {"3x": {"max_steps": 840, "eval_every": 210}},
    {"default": {}, "swiglu": {"activation": "swiglu"}},
]
baseline = "3x-default"
