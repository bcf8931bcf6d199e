# pretrain.py: a small Motif from nothing, in a few minutes on a CPU and without network
#
# A model of 3.6M parameters with 4:1 grouped differential attention reads four domains: text and
# code of the Python installation itself, and generated problems in mathematics and science. The
# curriculum moves from general text to worked problems.

vocab_size = 272          # 256 bytes and 7 special tokens, rounded up to a multiple of 16
hidden_size = 256
intermediate_size = 768
num_hidden_layers = 4
num_attention_heads = 10  # 8 signal and 2 noise heads: 4:1, as in the 12.7B model. Their
                          # 10 x 32 numbers need not be hidden_size
num_noise_heads = 2
num_key_value_heads = 4   # 2 groups, each with a signal and a noise key
head_dim = 32
max_position_embeddings = 1024

# name: [source, share of the tokens at the start, share at the end]
domains = {
    "language": ["builtin:language", 0.50, 0.20],
    "code": ["builtin:code", 0.30, 0.30],
    "math": ["builtin:math", 0.10, 0.30],
    "science": ["builtin:science", 0.10, 0.20],
}

max_steps = 280
seq_len = [[0, 128], [350_000, 256]]  # 128 tokens are cheaper, and enough to learn words
batch_tokens = 2048
micro_batch_tokens = 2048
lr = 8e-3                 # the best of 2e-3, 4e-3, 8e-3 and 16e-3 in runs of 100 steps
warmup_steps = 20
decay_fraction = 0.5      # lr falls over the second half of the tokens
eval_every = 70
eval_tokens = 4096
save_every = 70
prompts = ["The file object ", "    def read(self, ", "Compute 7^19 mod 11.",
           "A spring launches a puck across a smooth table."]
