# pretrain.py: Motif-2.6B, from which Motif-2-12.7B grew (arXiv 2508.09148)
#
# Every published value is here. [ours] marks a choice of this project where nothing is published.

vocab_size = 219520
hidden_size = 2048
intermediate_size = 8192
num_hidden_layers = 32
num_attention_heads = 16          # 8 signal and 8 noise heads: plain differential attention
num_noise_heads = 8
num_key_value_heads = 16          # 8 pairs
head_dim = 128
rms_norm_eps = 1e-6
attn_rms_norm_eps = 1e-5
rope_theta = 10_000.0             # published: 500,000 once sequences grow; start a new run for that
max_position_embeddings = 16384
tie_word_embeddings = True
poly_norm_scale = 1 / 16           # [ours] its weights begin at 1/48; in its paper at 1/3

tokenizer = "Motif-Technologies/Motif-2.6B"  # its tokenizer.json, from the Hub
# The shares are published; they change linearly over the run. The data sets are [ours].
domains = {
    "web": ["HuggingFaceFW/fineweb", 0.68, 0.33],
    "multilingual": ["HuggingFaceFW/fineweb-2?name=cmn_Hani", 0.07, 0.00],
    "korean": ["HuggingFaceFW/fineweb-2?name=kor_Hang", 0.01, 0.30],
    "academic": ["common-pile/peS2o", 0.06, 0.03],
    "specialised": ["common-pile/pubmed", 0.05, 0.01],
    "code": ["codeparrot/codeparrot-clean?text=content", 0.10, 0.18],
    "math": ["open-web-math/open-web-math", 0.02, 0.10],
    "reasoning": ["nvidia/OpenMathReasoning?split=cot&text=problem,generated_solution", 0.01, 0.05],
}

max_tokens = 2_500_000_000_000    # [ours] of the order that the report states
# The two lengths are published. The switch is [ours]: it comes where the learning rate decays.
seq_len = [[0, 4096], [2_000_000_000_000, 16384]]
batch_tokens = 2**23              # [ours] 8M: half of what the larger model begins with
micro_batch_tokens = 16384        # [ours] one sequence of the longer kind
lr = 5e-4                         # [ours] above the 12.7B model's: smaller models take larger steps
warmup_steps = 2000               # [ours] common at this scale
decay_fraction = 0.2              # [ours] common for a warm-up, stable, decay schedule
decay = "linear"                  # [ours] the plainest shape
min_lr = 0.1                      # [ours] the 12.7B model's

optimizer = "muonclip"
momentum = 0.95                   # [ours] the usual value for Muon
weight_decay = 0.1                # [ours] the 12.7B model's in fine-tuning
ns_coefficients = "motif"         # the five triples of the vendor's public optimizer
qk_clip_threshold = 100.0         # [ours] Kimi K2's
grad_clip = 1.0                   # [ours] the usual value

log_every = 10
eval_every = 1000
eval_tokens = 2**20
save_every = 500
keep_every = 10_000
prompts = ["The city of", "def fibonacci(n):", "Theorem. Let"]
