# ablate.py: is PolyNorm still behind SwiGLU in the quick start's model with twice the layers?

base = "config/quickstart.py"
axes = [
    {"8layers": {"num_hidden_layers": 8}},
    {"default": {}, "swiglu": {"activation": "swiglu"}},
]
baseline = "8layers-default"
