"""The demo behind `make demo`: fine-tune a real pretrained model on real data, on six CPU ranks."""
