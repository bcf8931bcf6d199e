# sft.py: the report's three stages at the size of the 12.7B model
#
# Two steps of stage 1 were run with rows and recomputation as here, from random weights, on two
# H200: 83 GiB of each (MEASUREMENTS.md). A step holds as many tokens as give 100 steps, but at most
# 32M, unless you set --batch_tokens.
#
# Learning rates are those of STAGES in sft.py, batch and sequence length its defaults. The report's
# data are not public: --data="{'name': ['owner/name', 1.0], ...}" names yours. --model names the
# weights to start from: out/motif2_12b, out/motif2_12b-sft1 and out/motif2_12b-sft2.

micro_batch_tokens = 16_384        # one row
activation_checkpoint_layers = 40  # all blocks
timeout_seconds = 1800
eval_every = 100
eval_tokens = 262_144
save_every = 100
sample_tokens = 400
