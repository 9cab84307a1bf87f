"""What people see: words, figures, pages, the terminal."""
