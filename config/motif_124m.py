# pretrain.py: a Motif of GPT-2 small's size, for one GPU
#
# Depth and width are GPT-2 small's. The attention has Motif-2's form: 4 signal heads for each noise
# head, key and value heads in pairs.

vocab_size = 50304             # GPT-2's 50,257 and 6 tokens of the turn format, rounded up to 64
hidden_size = 768
intermediate_size = 2048       # 8/3 of the width: with its gate as many parameters as GPT-2's 4x
num_hidden_layers = 12
num_attention_heads = 10       # 8 signal and 2 noise heads
num_noise_heads = 2
num_key_value_heads = 4        # 2 pairs
head_dim = 64
max_position_embeddings = 4096
tie_word_embeddings = True     # like GPT-2 and Motif-2.6B; an untied head would add 39M parameters

tokenizer = "gpt2"
# Large data sets without an access gate. The mixture moves from web text to code and mathematics.
domains = {
    "web": ["HuggingFaceFW/fineweb-edu?name=sample-10BT", 0.75, 0.45],
    "code": ["codeparrot/codeparrot-clean?text=content", 0.15, 0.25],
    "math": ["open-web-math/open-web-math", 0.10, 0.30],
}

max_tokens = 2_500_000_000     # about 20 for each parameter
seq_len = 1024
batch_tokens = 2**19           # 0.5M, as for GPT-2 and nanoGPT
micro_batch_tokens = 2**14
lr = 2e-3                      # [ours] above the 12.7B model's: smaller models take larger steps
warmup_steps = 200
decay_fraction = 0.3
min_lr = 0.1

log_every = 10
eval_every = 250
eval_tokens = 2**18
save_every = 500
prompts = ["The city of", "def fibonacci(n):", "Theorem. Let", "To make bread,"]
