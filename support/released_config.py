"""config.json of a released model, to and from the fields of model.MotifConfig."""
from configurator import UserError

# MotifConfig.activation -> hidden_act of config.json
ACTIVATIONS = {"poly_norm": "poly_norm", "swiglu": "silu"}

# The Hub repository whose Python code transformers and vLLM run for a config.json of ours.
MODELING_REPO = "Motif-Technologies/Motif-2-12.7B-Base"


def released_shape(config: dict) -> dict:
    """The fields of MotifConfig in a released config.json, among its other keys."""
    config = dict(config)
    for key, value in {"use_bias": False, "k_ratio": 1, "use_sliding_window": False}.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"config.json has {key}={config[key]}; only {value} is supported")
    required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads"]
    missing = [key for key in required if key not in config]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")

    # transformers 5 writes rope_theta into rope_parameters.
    for key in "rope_scaling", "rope_parameters":
        rope_options = config.get(key) or {}
        is_plain = rope_options.get("rope_type", "default") == "default"
        if not is_plain or rope_options.keys() - {"rope_type", "rope_theta"}:
            raise UserError(f"config.json has {key}={rope_options}; only plain RoPE is known")
        if "rope_theta" in rope_options:
            config["rope_theta"] = rope_options["rope_theta"]

    act = config.get("hidden_act", "poly_norm")
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()}
    if act not in ours:
        raise UserError(f"config.json has hidden_act={act!r}; known: {', '.join(ours)}")
    config["activation"] = ours[act]

    # Motif-2.6B states neither num_noise_heads nor head_dim; half of its heads are noise heads.
    heads = config["num_attention_heads"]
    if config.get("num_noise_heads") is None:
        config["num_noise_heads"] = heads // 2
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // heads
    return config


def released_config(shape: dict) -> dict:
    """The released config.json of a model with these fields of MotifConfig."""
    config = dict(shape)
    config["hidden_act"] = ACTIVATIONS[config.pop("activation")]
    code = {"AutoConfig": f"{MODELING_REPO}--configuration_motif.MotifConfig",
            "AutoModelForCausalLM": f"{MODELING_REPO}--modeling_motif.MotifForCausalLM"}
    return {"architectures": ["MotifForCausalLM"], "model_type": "motif", **config,
            "k_ratio": 1, "use_bias": False, "auto_map": code}
