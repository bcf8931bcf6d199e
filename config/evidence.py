# pretrain.py: the run that tools.ablate compares configurations with
#
# The shape of config/motif_124m.py, for 52M tokens: on one H200 some three minutes. The three files
# and GPT-2's tokenizer are read from the folder evidence/, which may be a link.

vocab_size = 50304
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 10       # 8 signal and 2 noise heads
num_noise_heads = 2
num_key_value_heads = 4        # 2 pairs
head_dim = 64
max_position_embeddings = 4096
tie_word_embeddings = True
poly_norm_scale = 1.0          # PolyNorm begins as in its paper, but where a grid says otherwise

tokenizer = "evidence/gpt2.tiktoken"
domains = {
    "language": ["evidence/language.jsonl.xz", 0.45, 0.25],
    "docs": ["evidence/docs.jsonl.xz", 0.20, 0.20],
    "science_math": ["evidence/science_math.jsonl.xz", 0.20, 0.35],
    "code": ["builtin:code", 0.15, 0.20],
}

max_steps = 400
seq_len = 1024
batch_tokens = 2**17
micro_batch_tokens = 2**16
lr = 4e-3                      # better than 2e-3 and 8e-3 in the grid learning_rate
warmup_steps = 40
decay_fraction = 0.3
min_lr = 0.1

log_every = 10
eval_every = 100
eval_tokens = 2**18           # of each domain, or as many as it holds out
save_every = None              # a run that is cut begins anew
prompts = []
