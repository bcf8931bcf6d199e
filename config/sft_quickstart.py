# sft.py: the three stages of the quick start's model, a few minutes each on a CPU
#
# sft.py reads this file where it is given neither another one nor --model.
#
# Its tokens are bytes, so a row of 512 holds two to four conversations. Longer rows would have
# less padding, but cost more: on a CPU attention computes the whole row, masked parts included.

seq_len = 512
batch_tokens = 4096
micro_batch_tokens = 2048
lr_scale = 200            # a small model takes larger steps: 4e-3, 2e-3 and 1e-3
prompts = ["What does the module json do?", "Start with the number 12.\n1. Add 5\n2. Multiply by 3",
           "Start with the word lantern.\n1. Reverse it\n2. Count its letters"]
eval_every = 50
eval_tokens = 4096
save_every = 50
sample_tokens = 200
