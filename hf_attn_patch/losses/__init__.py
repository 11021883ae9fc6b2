"""Losses straight from hidden states; evaluation and training use them."""
