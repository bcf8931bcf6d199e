# sft.py: the three stages of the quick start's model, a few minutes in all on a CPU
#
# Its text is bytes, so a row of 1,024 holds some five conversations; its positions end there.

seq_len = 1024
batch_tokens = 4096
micro_tokens = 4096
lr_scale = 200                   # a small model takes larger steps: 4e-3, 2e-3 and 1e-3
eval_every = 50
eval_tokens = 8192
save_every = 50
sample_tokens = 200
