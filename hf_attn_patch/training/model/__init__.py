"""The student, its teacher and what is minimised."""
