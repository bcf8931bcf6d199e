# pretrain.py: the scale of GPT-2 small, for one GPU
#
# The attention's shape is Motif-2's (4:1, pairs of KV heads); depth and width are GPT-2 small's.

vocab_size = 50304               # GPT-2's 50,257 and the turn format's 6 tokens, rounded up to 64
hidden_size = 768
intermediate_size = 2048         # 8/3 of the width: with a gate as many parameters as GPT-2's 4x
num_hidden_layers = 12
num_attention_heads = 10         # 8 signal and 2 noise heads of 64
num_noise_heads = 2
num_key_value_heads = 4          # 2 pairs
head_dim = 64
max_position_embeddings = 4096
tie_word_embeddings = True       # as GPT-2 and Motif-2.6B; a head of its own would be 39M more

tokenizer = "gpt2"
domains = {                      # large ungated sets; from web text to specialised
    "web": ["HuggingFaceFW/fineweb-edu?name=sample-10BT", 0.75, 0.45],
    "code": ["codeparrot/codeparrot-clean?text=content", 0.15, 0.25],
    "math": ["open-web-math/open-web-math", 0.10, 0.30],
}

max_tokens = 2_500_000_000       # about 20 per parameter
seq_len = 1024
batch_tokens = 2**19             # 0.5M, GPT-2's and nanoGPT's
micro_batch_tokens = 2**14
lr = 2e-3                        # [ours] above the 12.7B model's 4e-4, as smaller models want
warmup_steps = 200
decay_fraction = 0.3
min_lr = 0.1

log_every = 10
eval_every = 250
eval_tokens = 2**18
save_every = 500
prompts = ["The city of", "def fibonacci(n):", "Theorem. Let", "To make bread,"]
