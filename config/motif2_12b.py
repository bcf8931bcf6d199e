# pretrain.py: Motif-2-12.7B (arXiv 2511.07464)
#
# Every published value is here. [ours] marks a choice of this project where nothing is published.

vocab_size = 219520
hidden_size = 4096
intermediate_size = 16384
num_hidden_layers = 40
num_attention_heads = 40           # 32 signal and 8 noise heads: 4:1
num_noise_heads = 8
num_key_value_heads = 16           # 8 pairs
head_dim = 128
rms_norm_eps = 1e-6
attn_rms_norm_eps = 1e-5
rope_theta = 1_000_000.0
max_position_embeddings = 32768
tie_word_embeddings = False
poly_norm_scale = 1 / 16           # [ours] its weights begin at 1/48; in its paper at 1/3

tokenizer = "Motif-Technologies/Motif-2-12.7B-Base"  # its tokenizer.json, from the Hub
# The report's shares are not public. These are [ours]: the 2.6B model's, with more reasoning at the
# end. The report keeps reasoning under 10% of the tokens; here it rises to 9%.
domains = {
    "web": ["HuggingFaceFW/fineweb", 0.68, 0.30],
    "multilingual": ["HuggingFaceFW/fineweb-2?name=cmn_Hani", 0.07, 0.00],
    "korean": ["HuggingFaceFW/fineweb-2?name=kor_Hang", 0.01, 0.28],
    "academic": ["common-pile/peS2o", 0.06, 0.03],
    "specialised": ["common-pile/pubmed", 0.05, 0.01],
    "code": ["codeparrot/codeparrot-clean?text=content", 0.10, 0.18],
    "math": ["open-web-math/open-web-math", 0.02, 0.11],
    "reasoning": ["nvidia/OpenMathReasoning?split=cot&text=problem,generated_solution", 0.01, 0.09],
}

max_tokens = 5_500_000_000_000
seq_len = [[0, 4096], [4_500_000_000_000, 16384]]  # longer while the last 1T tokens anneal
# The batch grows from 16M to 80M tokens in steps, as published. Where the steps are is [ours].
batch_tokens = [
    [0, 16_777_216], [500_000_000_000, 33_554_432], [1_500_000_000_000, 50_331_648],
    [3_000_000_000_000, 67_108_864], [4_000_000_000_000, 83_886_080]]
micro_batch_tokens = 16384         # [ours] 4 sequences of 4,096 tokens, later 1 of 16,384
activation_checkpoint_layers = 30  # [ours] out of 40: fits 8 GPUs of 80 GB with some room
lr = 4e-4
warmup_steps = 2000                # [ours] common at this scale
decay_fraction = 0.1818            # the last 1T of 5.5T tokens
decay = "linear"                   # [ours] the plainest shape
min_lr = 0.1                       # "about 10%" of the peak

optimizer = "muonclip"
momentum = 0.95                    # [ours] the usual value for Muon
weight_decay = 0.1                 # as in the report's fine-tuning
ns_coefficients = "motif"          # the five triples of the vendor's public optimizer
qk_clip_threshold = 100.0          # [ours] Kimi K2's
grad_clip = 1.0                    # [ours] the usual value

log_every = 10
eval_every = 1000
eval_tokens = 2**20
save_every = 250
keep_last = 3
keep_every = 10_000
prompts = ["The city of", "def fibonacci(n):", "Theorem. Let"]
