"""What all pages share: numbers, tables, figures, Markdown, differences of texts."""
