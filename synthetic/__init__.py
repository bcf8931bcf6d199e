"""What the quick start reads, made without a network: texts.py for pre-training, conversations.py
for the supervised stages."""
