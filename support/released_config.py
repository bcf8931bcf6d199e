"""config.json of a released model, to and from the fields of model.MotifConfig."""
import torch.distributed as dist

from configurator import Count, UserError, check_value, short

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads")
OPTIONAL = ("num_noise_heads", "head_dim", "rms_norm_eps", "attn_rms_norm_eps", "rope_theta",
            "max_position_embeddings", "tie_word_embeddings")

# MotifConfig.activation -> hidden_act of config.json
ACTIVATIONS = {"poly_norm": "poly_norm", "swiglu": "silu"}

# Keys that ask for another model, where they have another value than this one. Those of the second
# group are Motif-3's (arXiv 2608.09119).
NOT_SUPPORTED = {
    "use_bias": (False, "biases"),
    "k_ratio": (1, "another number of keys for each noise head"),
    "use_sliding_window": (False, "attention to the last tokens alone"),

    "kv_lora_rank": (0, "latent attention"),
    "num_experts": (0, "experts"),
    "polynorm_output_scale": (1, "another PolyNorm"),
    "polynorm_sigmoid_weight": (False, "another PolyNorm"),
    "mhc_expansion_rate": (1, "several residual streams"),
}

DEFAULT_ROPE_THETA = 10_000.0       # of the released code, where a config.json gives none

# The Hub repository whose Python code transformers and vLLM run for a config.json of ours.
MODELING_REPO = "Motif-Technologies/Motif-2-12.7B-Base"


def read_released_config(config: dict) -> dict:
    """A released config.json -> the fields of MotifConfig that follow from it. UserError if it
    describes another kind of model. Keys that are null count as absent, unknown ones are ignored.
    """
    config = {key: value for key, value in config.items() if value is not None}
    check_kind(config)
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    for key in REQUIRED:
        check_value(f"config.json: {key}", Count, config[key])

    # Motif-2.6B states neither num_noise_heads nor head_dim; half of its heads are noise heads.
    heads = config["num_attention_heads"]
    shape = {"num_noise_heads": heads // 2, "head_dim": config["hidden_size"] // heads}
    for key in REQUIRED + OPTIONAL:
        if key in config:
            shape[key] = config[key]
    shape["rope_theta"] = find_rope_theta(config)
    shape["activation"] = find_activation(config)
    return shape


def check_kind(config: dict) -> None:
    """UserError, which names all that is asked for, unless the config is one of a Motif-2."""
    kind = config.get("model_type", "motif")
    if str(kind).lower() != "motif":                 # released as "motif" and as "Motif"
        raise UserError(f"config.json has model_type={short(kind)}; only 'motif' is read")

    asked = []
    for key, (supported, meaning) in NOT_SUPPORTED.items():
        value = config.get(key, supported)
        if value != supported:
            asked.append(f"{key}={short(value)} ({meaning})")
    if asked:
        raise UserError(f"config.json asks for {', '.join(asked)}, which Motif-2 does not have")


def find_rope_theta(config: dict) -> float:
    """The base of plain RoPE, the only kind that is read. transformers 4 writes it as rope_theta,
    transformers 5 as rope_parameters: {"rope_type": "default", "rope_theta": 10000.0}."""
    theta = config.get("rope_theta")
    for key in "rope_scaling", "rope_parameters":
        options = config.get(key) or {}
        if not isinstance(options, dict):
            raise UserError(f"config.json: {key} must be an object, not {short(options)}")
        kind = options.get("rope_type", options.get("type", "default"))
        others = options.keys() - {"rope_type", "type", "rope_theta"}
        if kind != "default":
            raise UserError(f"config.json: {key} has rope_type={short(kind)}; only plain RoPE, "
                            "which is called 'default', is read")
        if others:
            raise UserError(f"config.json: {key} has {short(sorted(others))}; only plain RoPE, "
                            "without these, is read")
        theta = options.get("rope_theta", theta)

    if theta is None:
        theta = DEFAULT_ROPE_THETA
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"config.json gives no rope_theta; {theta} is taken", flush=True)
    return theta


def find_activation(config: dict) -> str:
    act = config.get("hidden_act", "poly_norm")
    for ours, theirs in ACTIVATIONS.items():
        if act == theirs:
            return ours
    known = ", ".join(ACTIVATIONS.values())
    raise UserError(f"config.json has hidden_act={short(act)}; known: {known}")


def released_config(shape: dict) -> dict:
    """The released config.json of a model with these fields of MotifConfig."""
    config = dict(shape)
    config["hidden_act"] = ACTIVATIONS[config.pop("activation")]
    del config["poly_norm_scale"]                    # of fresh weights: no released file has it
    code = {"AutoConfig": f"{MODELING_REPO}--configuration_motif.MotifConfig",
            "AutoModelForCausalLM": f"{MODELING_REPO}--modeling_motif.MotifForCausalLM"}
    return {"architectures": ["MotifForCausalLM"], "model_type": "motif", **config,
            "k_ratio": 1, "use_bias": False, "auto_map": code}
