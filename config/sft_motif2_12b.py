# sft.py: the report's three stages at the 12.7B model's size, as STAGES has them
#
# Their data are not public: --data="{'name': ['owner/name', 1.0], ...}" gives the stage's, and for
# the first --model=out/motif2_12b the weights. Never run.

micro_batch_tokens = 16_384            # a row
activation_checkpoint_layers = 40                   # every block
timeout_seconds = 1800
eval_every = 100
eval_tokens = 262_144
save_every = 100
sample_tokens = 400
