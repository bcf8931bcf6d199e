# pretrain.py: from nothing to a small Motif in a few minutes on a CPU, with no network
#
# Four domains that any Python installation holds or a generator makes, and a curriculum from general
# text to worked problems; a 3.6M-parameter model in 4:1 grouped differential attention.

vocab_size = 272                 # 256 bytes and the turn format's 7 tokens, rounded up to 16
hidden_size = 256
intermediate_size = 768
num_hidden_layers = 4
num_attention_heads = 10         # 8 signal and 2 noise heads: 4:1, as in the 12.7B model
num_noise_heads = 2
num_key_value_heads = 4          # 2 pairs
head_dim = 32
max_position_embeddings = 1024

domains = {
    "language": ["builtin:language", 0.50, 0.20],
    "code": ["builtin:code", 0.30, 0.30],
    "math": ["builtin:math", 0.10, 0.30],
    "science": ["builtin:science", 0.10, 0.20],
}

max_steps = 250
seq_len = 256
batch_tokens = 2048
micro_tokens = 2048
lr = 4e-3
warmup_steps = 20
eval_every = 50
save_every = 50
prompts = ["The file object ", "def read(self, ", "Problem: Find the greatest common divisor", "A car of mass"]
