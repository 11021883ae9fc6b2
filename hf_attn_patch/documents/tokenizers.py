"""A model's tokenizer, and whether two models' are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_attn_patch.errors import TrainingError

SAMPLE = "def main(args):\n    return 3.14  # Ünïcode, 你好, 1,000,000 tokens\n"


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer.

    Raises:
        TrainingError: the model comes without one.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        ids = tokenizer(SAMPLE, verbose=False)["input_ids"]
    except Exception as error:  # of transformers, tokenizers or sentencepiece, from whatever the files hold
        raise TrainingError(f"{name} has no tokenizer that can be loaded ({first_line(error)})") from error
    if _of_nothing(tokenizer, Path(name)):
        raise TrainingError(f"{name} has no tokenizer that can be loaded (none of its files is there)")
    if not all(isinstance(id, (int, type(None))) for id in (*ids, tokenizer.eos_token_id, tokenizer.bos_token_id)):
        raise TrainingError(f"{name} has a tokenizer whose ids are no numbers")
    return tokenizer


def _of_nothing(tokenizer: Any, folder: Path) -> bool:
    """Whether transformers 5 made up a tokenizer without words, as it does of a folder without its files (T5, BART)."""
    names = set(getattr(type(tokenizer), "vocab_files_names", {}).values())  # none: bytes or characters (ByT5)
    known = names | {"tokenizer.json", "tokenizer.model", "tekken.json"}
    return bool(names) and folder.is_dir() and not any((folder / name).exists() for name in known)


def first_line(error: Exception) -> str:
    """What went wrong in a library, in short; the kind of error too where it says next to nothing.

    >>> first_line(KeyError("id")), first_line(ValueError("no such file\\nand a long story"))
    ("KeyError: 'id'", 'no such file')
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    return line if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: {line}"


def require_same_vocabulary(student: Any, teacher: Any, student_config: Any, teacher_config: Any) -> None:
    """Refuse a teacher whose words are not the student's: KL would compare different things.

    Args:
        student, teacher: tokenizers.
        student_config, teacher_config: the models' configs.

    Raises:
        TrainingError: the vocabularies, the special tokens, the way text is cut, or the models' sizes differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = {word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word)}
        example = min(differing)
        raise TrainingError(
            f"the teacher's tokenizer is another one: {len(differing)} of {len(ours | theirs)} words differ (such as "
            f"{example!r}); distil from the model that was converted, or train without --teacher"
        )
    cut, their_cut = student(SAMPLE)["input_ids"], teacher(SAMPLE)["input_ids"]
    if cut != their_cut:
        raise TrainingError(
            f"the teacher's tokenizer has the same words but cuts text otherwise ({cut[:8]}... against "
            f"{their_cut[:8]}...); take its tokenizer files from the model that was converted"
        )
    sizes = [c.get_text_config(decoder=True).vocab_size for c in (student_config, teacher_config)]
    if sizes[0] != sizes[1]:
        raise TrainingError(
            f"the teacher predicts {sizes[1]} words and the student {sizes[0]}: resize the embeddings of one of them"
        )
