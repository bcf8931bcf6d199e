# sft.py: the report's three stages at the size of the 12.7B model; never run
#
# Learning rates, batch and sequence length are those of STAGES in sft.py. The report's data are not
# public: --data="{'name': ['owner/name', 1.0], ...}" names yours, and --model=out/motif2_12b the
# pre-trained weights, from which stage 1 starts.

micro_batch_tokens = 16_384        # one row
activation_checkpoint_layers = 40  # all blocks
timeout_seconds = 1800
eval_every = 100
eval_tokens = 262_144
save_every = 100
sample_tokens = 400
