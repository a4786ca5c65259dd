"""The miniature laboratory: procedurally made tasks, a small teacher, and what makes a comparison fair."""
