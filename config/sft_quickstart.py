# sft.py: the three stages of the quick start's model, a few minutes in all on a CPU
#
# Its text is bytes: a row of 512 holds two or three conversations. Longer rows would have less
# padding and cost more: on a CPU attention passes over the whole row.

seq_len = 512
batch_tokens = 4096
micro_batch_tokens = 2048
lr_scale = 200                   # a small model takes larger steps: 4e-3, 2e-3 and 1e-3
eval_every = 50
eval_tokens = 4096
save_every = 50
sample_tokens = 200
