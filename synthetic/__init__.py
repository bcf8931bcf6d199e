"""What the quick start reads, made without network: texts.py for pre-training, conversations.py for
the supervised stages."""
