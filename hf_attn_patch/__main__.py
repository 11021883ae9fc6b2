"""``python -m hf_attn_patch`` is the command ``hf-attn``, for machines whose PATH does not have it."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="hf-attn")
